/* Products that all instruction sets with AVX-512 share. They are built from dot_bytes, which adds products of unsigned by
 * signed bytes, dot_nibbles, the same for unsigned bytes up to 15, and dot_shorts. */
#include "slots.h"

INLINE void tile_float(const int rows, const float *x, int64_t wide, const Linear *l, int first, int add, float *out,
                       int64_t stride) {
    const float *w = (const float *)l->weight + (int64_t)first * l->in;
    __m512 s[MOST_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++) s[r][j] = _mm512_setzero_ps();
    for (int k = 0; k < l->in; k++, w += PANEL)
        for (int r = 0; r < rows; r++) {
            __m512 v = _mm512_set1_ps(x[r * wide + k]);
            for (int j = 0; j < 4; j++) s[r][j] = _mm512_fmadd_ps(v, _mm512_load_ps(w + 16 * j), s[r][j]);
        }
    for (int j = 0; j < 4; j++) {
        __m512 bias = _mm512_loadu_ps(l->bias + first + 16 * j);
        for (int r = 0; r < rows; r++) {
            __m512 v = _mm512_add_ps(s[r][j], bias);
            float *to = out + r * stride + 16 * j;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(v, _mm512_loadu_ps(to)) : v);
        }
    }
}

/* ---- a decoder's attention: 16-bit queries and counts are split into two bytes, each with its own products ---- */

typedef struct { int8_t high[256], low[256]; } Query; /* 256 high + low */

INLINE void put_query(Query *q, int i, Ints v) {
    i_put_bytes(q->high + i, _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8));
    i_put_bytes(q->low + i, v);
}

/* Set ``product[g]`` to a query's products with 16 keys, too high by 128 x the query's sum. Prefetches the values of the
 * same positions. */
INLINE void key_products(const int heads, const Query *q, const int8_t *keys, int64_t keys_apart, int padded,
                         const int8_t *values, int64_t values_apart, Floats *product) {
    __m512i h[MOST_HEADS], l[MOST_HEADS];
#pragma GCC unroll 4
    for (int g = 0; g < heads; g++) h[g] = l[g] = _mm512_setzero_si512();
    for (int i = 0; i < padded / 4; i++)
#pragma GCC unroll 4
        for (int g = 0; g < heads; g++) {
            int32_t h4, l4;
            __m512i k = _mm512_loadu_si512(keys + g * keys_apart + 64 * i);
            _mm_prefetch(values + g * values_apart + 64 * i, _MM_HINT_T0);
            memcpy(&h4, q[g].high + 4 * i, 4);
            memcpy(&l4, q[g].low + 4 * i, 4);
            h[g] = dot_bytes(h[g], k, _mm512_set1_epi32(h4));
            l[g] = dot_bytes(l[g], k, _mm512_set1_epi32(l4));
        }
#pragma GCC unroll 4
    for (int g = 0; g < heads; g++)
        product[g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(h[g]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(l[g]));
}

#define COUNT_BYTES 2

/* Write the high bytes of 16 counts, then the low bytes. */
INLINE void put_counts(uint8_t *p, Ints counts) {
    i_put_bytes(p, _mm512_srli_epi32(counts, 8));
    i_put_bytes(p + 16, counts);
}

/* Multiply values by counts, for ``parts`` parts of 16 values of a head. */
INLINE void gather(const int parts, const uint8_t *p, const int8_t *values, int padded, const int32_t *table, int64_t stride,
                   int n, float worth, float *out, int size) {
    __m512i h[4], l[4];
    for (int i = 0; i < parts; i++) h[i] = l[i] = _mm512_setzero_si512();
    for (int t = 0; t < n; t += 16)
        EACH_SLOT(t) {
            int32_t h4[4], l4[4];
            _mm_storeu_si128((__m128i *)h4, _mm_maskz_loadu_epi8(its, p + 2 * t));
            _mm_storeu_si128((__m128i *)l4, _mm_maskz_loadu_epi8(its, p + 2 * t + 16));
            const int8_t *v = values + from * padded;
            for (int j = 0; j < 4 && t + 4 * j < n; j++, v += 4 * padded)
                for (int i = 0; i < parts; i++) {
                    __m512i bytes = _mm512_loadu_si512(v + 64 * i);
                    h[i] = dot_bytes(h[i], _mm512_set1_epi32(h4[j]), bytes);
                    l[i] = dot_bytes(l[i], _mm512_set1_epi32(l4[j]), bytes);
                }
        }
    for (int i = 0; i < parts; i++) {
        __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(h[i]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(l[i]));
        _mm512_mask_storeu_ps(out + 16 * i, first_of(size - 16 * i), _mm512_mul_ps(v, _mm512_set1_ps(worth)));
    }
}

/* ---- a classifier's attention ---- */

/* Set ``sum`` to shares times values, for 32 values of a head. */
INLINE void value_sums(int rows, const int16_t *shares, int64_t keys, const int32_t *v, int padded, int64_t pairs,
                       Ints sum[MOST_ROWS][2]) {
    (void)rows; /* other rows have stale shares, but their sums are not read */
    for (int r = 0; r < MOST_ROWS; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int j = 0; j < pairs; j++, v += padded) {
        __m512i v0 = _mm512_load_si512(v), v1 = _mm512_load_si512(v + 16);
        for (int r = 0; r < MOST_ROWS; r++) {
            int32_t two;
            memcpy(&two, shares + r * keys + 2 * j, 4);
            __m512i p = _mm512_set1_epi32(two);
            sum[r][0] = dot_shorts(sum[r][0], p, v0);
            sum[r][1] = dot_shorts(sum[r][1], p, v1);
        }
    }
}
