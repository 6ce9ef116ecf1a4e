/* Products of a language model's matrices, and float16 caches, for instruction sets with AVX2. */

INLINE Floats f_load_halves(const uint16_t *x) {
    const __m128i *halves = (const __m128i *)x;
    return (Floats){_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
INLINE void f_store_halves(uint16_t *to, Floats x) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)to + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

INLINE const char *prefetch(const char *at, int lines) {
    for (int i = 0; i < lines; i++, at += 64) _mm_prefetch(at, _MM_HINT_T1);
    return at;
}

INLINE void put(float *to, __m256 v, int add) { _mm256_storeu_ps(to, add ? _mm256_add_ps(v, _mm256_loadu_ps(to)) : v); }

/* Keep the compiler from adding products of several steps first, which needs more registers than there are. */
#define IN_ORDER(x) __asm__("" : "+x"(x))

/* Write a panel's integer sums as float32. With two ``chains``, each sum is that of two. */
INLINE void put_tile(const int rows, const int chains, __m256i s[][4], const float *steps, int64_t apart, const Matrix *m, int panel,
                     int add, float *out, int64_t out_stride) {
    const float *scale = (const float *)m->scale + panel * COLUMNS, *bias = m->bias + panel * COLUMNS;
    for (int j = 0; j < 2; j++) {
        __m256 factor = _mm256_loadu_ps(scale + 8 * j), more = _mm256_loadu_ps(bias + 8 * j);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m256 worth = _mm256_mul_ps(factor, _mm256_set1_ps(steps[r * apart]));
            __m256i sum = chains == 2 ? _mm256_add_epi32(s[r][j], s[r][2 + j]) : s[r][j];
            put(out + r * out_stride + 8 * j, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), worth, more), add);
        }
    }
}

#ifdef SHORTS
/* The even bytes of a vector as 16 bits, or the odd ones. */
INLINE __m256i shorts_at(const __m256i *x, int odd) {
    __m256i bytes = _mm256_load_si256(x);
    return _mm256_srai_epi16(odd ? bytes : _mm256_slli_epi16(bytes, 8), 8);
}

INLINE void tile_bytes(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                       int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    const __m256i *w = (const __m256i *)((const int8_t *)m->weight + panel * panel_bytes(m));
    const char *next = ahead.at;
    const int chains = rows <= 2 ? 2 : 1; /* to hide the latency */
    __m256i s[MOST_ROWS][4];
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = s[r][2] = s[r][3] = _mm256_setzero_si256();
    for (int b = 0; b < blocks_of(m->in); b++) {
        next = prefetch(next, ahead.lines);
#pragma GCC unroll 2
        for (int k = 0; k < BLOCK / 4; k++, w += 2)
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++, x += 4) {
                __m256i w0 = shorts_at(w, odd), w1 = shorts_at(w + 1, odd);
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++) {
                    int32_t two;
                    memcpy(&two, x + r * stride, 4);
                    __m256i v = _mm256_set1_epi32(two);
                    __m256i *sums = s[r] + odd % chains * 2;
                    sums[0] = dot_shorts(sums[0], w0, v);
                    sums[1] = dot_shorts(sums[1], w1, v);
                    IN_ORDER(sums[0]);
                    IN_ORDER(sums[1]);
                }
            }
    }
    put_tile(rows, chains, s, steps, apart, m, panel, add, out, out_stride);
}
#else
/* Sums start from a negative offset, because activations are 128 too high. */
INLINE void tile_bytes(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                       int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    const __m256i *w = (const __m256i *)((const int8_t *)m->weight + panel * panel_bytes(m));
    const char *next = ahead.at;
    const int chains = rows <= 2 ? 2 : 1; /* to hide latency */
    __m256i s[MOST_ROWS][4];
    for (int j = 0; j < 2; j++) {
        __m256i none = _mm256_setzero_si256(), offset = _mm256_loadu_si256((const __m256i *)(m->offset + panel * COLUMNS) + j);
        for (int r = 0; r < rows; r++) s[r][j] = _mm256_sub_epi32(none, offset), s[r][2 + j] = none;
    }
    for (int b = 0; b < blocks_of(m->in); b++) {
        next = prefetch(next, ahead.lines);
#pragma GCC unroll 2
        for (int k = 0; k < BLOCK / 4; k++, w += 2, x += 4)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                Weights v = weights_of(_mm256_load_si256(w + j));
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++) {
                    __m256i *sum = s[r] + k % chains * 2 + j;
                    *sum = dot_weights(*sum, FOUR_BYTES(x + r * stride, j), v);
                    IN_ORDER(*sum);
                }
            }
    }
    put_tile(rows, chains, s, steps, apart, m, panel, add, out, out_stride);
}
#endif

INLINE __m256 eight_bfloat16(const uint16_t *x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16));
}

INLINE void half_nibbles(const int rows, int half, const uint8_t *x, int64_t stride, const float *steps, int64_t apart,
                         const Matrix *m, int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    int blocks = blocks_of(m->in);
    int64_t first = (int64_t)panel * blocks * COLUMNS + 8 * half;
    const __m256i *w = (const __m256i *)((const uint8_t *)m->weight + panel * panel_bytes(m)) + half;
    const uint16_t *scales = (const uint16_t *)m->scale + first, *lows = m->low + first;
    const char *next = ahead.at;
    const __m256i mask = _mm256_set1_epi8(15);
    __m256 sum[MOST_ROWS];
    for (int r = 0; r < rows; r++) sum[r] = _mm256_setzero_ps();
    for (int b = 0; b < blocks; b++, w += 8, x += BLOCK, scales += COLUMNS, lows += COLUMNS) {
        __m256i s[MOST_ROWS];
        next = prefetch(next, ahead.lines);
        for (int r = 0; r < rows; r++) s[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            __m256i two = _mm256_load_si256(w + 2 * k), low = _mm256_and_si256(two, mask);
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(two, 4), mask);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, x + r * stride + 4 * k, 4);
                s[r] = dot_nibbles(s[r], low, _mm256_set1_epi32(four));
                IN_ORDER(s[r]);
                memcpy(&four, x + r * stride + 16 + 4 * k, 4);
                s[r] = dot_nibbles(s[r], high, _mm256_set1_epi32(four));
                IN_ORDER(s[r]);
            }
        }
        __m256 scale = eight_bfloat16(scales), minimum = eight_bfloat16(lows);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m256 product = _mm256_cvtepi32_ps(nibble_sums(s[r]));
            sum[r] = _mm256_fmadd_ps(_mm256_mul_ps(product, scale), _mm256_set1_ps(steps[r * apart + b]), sum[r]);
            sum[r] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(steps[r * apart + blocks + b]), sum[r]);
        }
    }
    __m256 bias = _mm256_loadu_ps(m->bias + panel * COLUMNS + 8 * half);
    for (int r = 0; r < rows; r++) put(out + r * out_stride + 8 * half, _mm256_add_ps(sum[r], bias), add);
}

INLINE void tile_nibbles(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                         int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    half_nibbles(rows, 0, x, stride, steps, apart, m, panel, add, out, out_stride, ahead);
    half_nibbles(rows, 1, x, stride, steps, apart, m, panel, add, out, out_stride, (Ahead){ahead.at, 0});
}

INLINE void tile_floats(const int rows, const uint8_t *x, int64_t stride, const Matrix *m, int panel, int add, float *out,
                        int64_t out_stride) {
    const float *w = (const float *)((const char *)m->weight + panel * panel_bytes(m)), *bias = m->bias + panel * COLUMNS;
    __m256 s[MOST_ROWS][2];
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm256_setzero_ps();
    for (int k = 0; k < m->in; k++, w += COLUMNS)
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m256 v = _mm256_set1_ps(((const float *)(x + r * stride))[k]);
            s[r][0] = _mm256_fmadd_ps(v, _mm256_loadu_ps(w), s[r][0]);
            s[r][1] = _mm256_fmadd_ps(v, _mm256_loadu_ps(w + 8), s[r][1]);
        }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 2; j++)
            put(out + r * out_stride + 8 * j, _mm256_add_ps(s[r][j], _mm256_loadu_ps(bias + 8 * j)), add);
}
