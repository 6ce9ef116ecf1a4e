/* Products of a language model's matrices, and float16 caches, for instruction sets with AVX-512. */

INLINE Floats f_load_halves(const uint16_t *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)); }
INLINE void f_store_halves(uint16_t *to, Floats x) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE const char *prefetch(const char *at, int lines) {
    for (int i = 0; i < lines; i++, at += 64) _mm_prefetch(at, _MM_HINT_T1);
    return at;
}

INLINE void put(float *to, __m512 v, int add) { _mm512_storeu_ps(to, add ? _mm512_add_ps(v, _mm512_loadu_ps(to)) : v); }

/* Write a panel's integer sums, each that of two, as float32. */
INLINE void put_tile(const int rows, __m512i s[][2], const float *steps, int64_t apart, const Matrix *m, int panel, int add, float *out,
                     int64_t out_stride) {
    __m512 scale = _mm512_loadu_ps((const float *)m->scale + panel * COLUMNS), bias = _mm512_loadu_ps(m->bias + panel * COLUMNS);
    for (int r = 0; r < rows; r++) {
        __m512 worth = _mm512_mul_ps(scale, _mm512_set1_ps(steps[r * apart]));
        __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(s[r][0], s[r][1]));
        put(out + r * out_stride, _mm512_fmadd_ps(sum, worth, bias), add);
    }
}

#ifdef SHORTS
INLINE void tile_bytes(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                       int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    const __m512i *w = (const __m512i *)((const int8_t *)m->weight + panel * panel_bytes(m));
    const char *next = ahead.at;
    __m512i s[MOST_ROWS][2]; /* of even and odd inputs, to hide latency */
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm512_setzero_si512();
    for (int b = 0; b < blocks_of(m->in); b++) {
        next = prefetch(next, ahead.lines);
        for (int k = 0; k < BLOCK / 4; k++, w++, x += 8) {
            __m512i four = _mm512_load_si512(w), even = _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8);
            __m512i odd = _mm512_srai_epi16(four, 8);
            for (int r = 0; r < rows; r++) {
                int32_t two[2];
                memcpy(two, x + r * stride, 8);
                s[r][0] = dot_shorts(s[r][0], even, _mm512_set1_epi32(two[0]));
                s[r][1] = dot_shorts(s[r][1], odd, _mm512_set1_epi32(two[1]));
            }
        }
    }
    put_tile(rows, s, steps, apart, m, panel, add, out, out_stride);
}
#else
/* Sums start from a negative offset, because activations are 128 too high. */
INLINE void tile_bytes(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                       int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    const __m512i *w = (const __m512i *)((const int8_t *)m->weight + panel * panel_bytes(m));
    const char *next = ahead.at;
    __m512i s[MOST_ROWS][2]; /* of even and odd fours of inputs, to hide latency */
    __m512i none = _mm512_setzero_si512(), start = _mm512_sub_epi32(none, _mm512_loadu_si512(m->offset + panel * COLUMNS));
    for (int r = 0; r < rows; r++) s[r][0] = start, s[r][1] = none;
    for (int b = 0; b < blocks_of(m->in); b++) {
        next = prefetch(next, ahead.lines);
#pragma GCC unroll 8
        for (int k = 0; k < BLOCK / 4; k++, w++, x += 4) {
            __m512i v = _mm512_load_si512(w);
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, x + r * stride, 4);
                s[r][k % 2] = dot_bytes(s[r][k % 2], _mm512_set1_epi32(four), v);
            }
        }
    }
    put_tile(rows, s, steps, apart, m, panel, add, out, out_stride);
}
#endif

INLINE __m512 sixteen_bfloat16(const uint16_t *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

INLINE void tile_nibbles(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                         int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    int blocks = blocks_of(m->in);
    int64_t first = (int64_t)panel * blocks * COLUMNS;
    const __m512i *w = (const __m512i *)((const uint8_t *)m->weight + panel * panel_bytes(m));
    const __m512i mask = _mm512_set1_epi8(15);
    const char *next = ahead.at;
    __m512 sum[MOST_ROWS];
    for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps();
    for (int b = 0; b < blocks; b++, x += BLOCK, first += COLUMNS) {
        __m512i s[MOST_ROWS];
        next = prefetch(next, ahead.lines);
        for (int r = 0; r < rows; r++) s[r] = _mm512_setzero_si512();
        for (int k = 0; k < 4; k++, w++) {
            __m512i two = _mm512_loadu_si512(w), low = _mm512_and_si512(two, mask);
            __m512i high = _mm512_and_si512(_mm512_srli_epi16(two, 4), mask);
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, x + r * stride + 4 * k, 4);
                s[r] = dot_nibbles(s[r], low, _mm512_set1_epi32(four));
                memcpy(&four, x + r * stride + 16 + 4 * k, 4);
                s[r] = dot_nibbles(s[r], high, _mm512_set1_epi32(four));
            }
        }
        __m512 scale = sixteen_bfloat16((const uint16_t *)m->scale + first), minimum = sixteen_bfloat16(m->low + first);
        for (int r = 0; r < rows; r++) {
            __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(s[r]), scale);
            sum[r] = _mm512_fmadd_ps(product, _mm512_set1_ps(steps[r * apart + b]), sum[r]);
            sum[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(steps[r * apart + blocks + b]), sum[r]);
        }
    }
    __m512 bias = _mm512_loadu_ps(m->bias + panel * COLUMNS);
    for (int r = 0; r < rows; r++) put(out + r * out_stride, _mm512_add_ps(sum[r], bias), add);
}

INLINE void tile_floats(const int rows, const uint8_t *x, int64_t stride, const Matrix *m, int panel, int add, float *out,
                        int64_t out_stride) {
    const float *w = (const float *)((const char *)m->weight + panel * panel_bytes(m));
    __m512 s[MOST_ROWS], bias = _mm512_loadu_ps(m->bias + panel * COLUMNS);
    for (int r = 0; r < rows; r++) s[r] = _mm512_setzero_ps();
    for (int k = 0; k < m->in; k++, w += COLUMNS)
        for (int r = 0; r < rows; r++)
            s[r] = _mm512_fmadd_ps(_mm512_set1_ps(((const float *)(x + r * stride))[k]), _mm512_loadu_ps(w), s[r]);
    for (int r = 0; r < rows; r++) put(out + r * out_stride, _mm512_add_ps(s[r], bias), add);
}
