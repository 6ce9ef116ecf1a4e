/* Kernels for x86-64 CPUs with AVX-512 F, BW, DQ, VL and VNNI.
 *
 * Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", VPDPBUSD. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "../kernels.h"

#define NAME "avx512vnni"
#define TABLE kernels_avx512vnni
#define ZERO 128 /* VPDPBUSD multiplies unsigned by signed bytes */

typedef __m512 Floats;
typedef __m512i Ints;

INLINE __mmask16 first_of(int left) { return left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0; }

INLINE Floats f_zero(void) { return _mm512_setzero_ps(); }
INLINE Floats f_set(float x) { return _mm512_set1_ps(x); }
INLINE Floats f_load(const float *x) { return _mm512_loadu_ps(x); }
INLINE Floats f_load_some(const float *x, int left) { return _mm512_maskz_loadu_ps(first_of(left), x); }
INLINE Floats f_load_or(const float *x, int left, float other) { return _mm512_mask_loadu_ps(f_set(other), first_of(left), x); }
INLINE void f_store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
INLINE void f_store_some(float *to, Floats x, int left) { _mm512_mask_storeu_ps(to, first_of(left), x); }
INLINE Floats f_first(Floats x, int left) { return _mm512_maskz_mov_ps(first_of(left), x); }
INLINE Floats f_select(uint32_t mask, Floats a, Floats b) { return _mm512_mask_blend_ps((__mmask16)mask, a, b); }
INLINE Floats f_where_positive(Floats x, Floats y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), y);
}
INLINE Floats f_add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats f_sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats f_mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats f_div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats f_fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats f_fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
INLINE Floats f_max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats f_min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats f_abs(Floats x) { return _mm512_abs_ps(x); }
INLINE Floats f_fraction(Floats x) { return _mm512_reduce_ps(x, 1); }
INLINE Floats f_scale(Floats x, Floats y) { return _mm512_scalef_ps(x, y); }
INLINE Floats f_lookup(const float *table, Ints i) { return _mm512_permutexvar_ps(i, _mm512_loadu_ps(table)); }
INLINE uint32_t f_greater(Floats a, float b) { return _mm512_cmp_ps_mask(a, _mm512_set1_ps(b), _CMP_GT_OQ); }
INLINE float f_highest(Floats x) { return _mm512_reduce_max_ps(x); }
INLINE float f_sum(Floats x) { /* explicit, so that the order does not depend on the compiler */
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

INLINE Ints f_bits(Floats x) { return _mm512_castps_si512(x); }
INLINE Floats f_from(Ints x) { return _mm512_cvtepi32_ps(x); }
INLINE Ints i_zero(void) { return _mm512_setzero_si512(); }
INLINE Ints i_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Ints i_round(Floats x) { return _mm512_cvtps_epi32(x); }
INLINE Ints i_add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE int32_t i_sum(Ints x) { return _mm512_reduce_add_epi32(x); }
INLINE Ints i_pair(Ints a, Ints b) {
    return _mm512_or_si512(_mm512_and_si512(a, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(b, 16));
}
INLINE uint32_t i_equal(const int32_t *x, int32_t y) {
    return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(x), _mm512_set1_epi32(y));
}
INLINE Ints i_load_bytes(const int8_t *x, int left) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_of(left), x)); }
INLINE void i_store(void *to, Ints x) { _mm512_storeu_si512(to, x); }
INLINE void i_put_bytes(void *to, Ints x) { _mm_storeu_si128(to, _mm512_cvtepi32_epi8(x)); }
INLINE void i_put_shorts(void *to, Ints x) { _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(x)); }
INLINE void i_put_every_fourth_byte(int8_t *to, Ints x, int place) {
    __m512i moved = _mm512_sllv_epi32(x, _mm512_set1_epi32(place * 8));
    __mmask64 mask = UINT64_C(0x1111111111111111) << place;
    _mm512_storeu_si512(to, _mm512_mask_mov_epi8(_mm512_loadu_si512(to), mask, moved));
}

/* Transpose 16 vectors of 16 values. */
INLINE void f_transpose(__m512 x[16]) {
    __m512 y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) /* select by index from each quarter, four vectors at a time */
        for (int j = 0; j < 2; j++) {
            __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
            x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int j = 0; j < 4; j++) {
        __m512 a = _mm512_shuffle_f32x4(x[j], x[j + 4], 0x88), b = _mm512_shuffle_f32x4(x[j], x[j + 4], 0xdd);
        __m512 c = _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0x88), d = _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0xdd);
        y[j] = _mm512_shuffle_f32x4(a, c, 0x88);
        y[j + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        y[j + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        y[j + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) x[i] = y[i];
}

#include "slots.h"

/* ---- linear layers ---- */

/* Sums start from a negative offset, because activations are 128 too high. ``ahead``: weights to prefetch, ``apart`` bytes
 * apart for each four inputs. */
INLINE void tile_int8(const int rows, const uint8_t *x, int64_t wide, const float *step, const Linear *l, int first, int add,
                      float *out, int64_t stride, const int8_t *ahead, int apart) {
    int quads = (l->in + 3) / 4;
    const int8_t *w = (const int8_t *)l->weight + (int64_t)first * quads * 4;
    __m512i s[MOST_ROWS][4];
    for (int j = 0; j < 4; j++) {
        s[0][j] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(l->offset + first + 16 * j));
        for (int r = 1; r < rows; r++) s[r][j] = s[0][j];
    }
    for (int k = 0; k < quads; k++, w += 4 * PANEL) {
        __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
        __m512i w2 = _mm512_load_si512(w + 128), w3 = _mm512_load_si512(w + 192);
        _mm_prefetch(ahead + (int64_t)k * apart, _MM_HINT_T0);
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * wide + 4 * k, 4);
            __m512i v = _mm512_set1_epi32(four);
            s[r][0] = _mm512_dpbusd_epi32(s[r][0], v, w0);
            s[r][1] = _mm512_dpbusd_epi32(s[r][1], v, w1);
            s[r][2] = _mm512_dpbusd_epi32(s[r][2], v, w2);
            s[r][3] = _mm512_dpbusd_epi32(s[r][3], v, w3);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 scale = _mm512_loadu_ps(l->scale + first + 16 * j), bias = _mm512_loadu_ps(l->bias + first + 16 * j);
        for (int r = 0; r < rows; r++) {
            __m512 worth = _mm512_mul_ps(scale, _mm512_set1_ps(step[r]));
            __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[r][j]), worth, bias);
            float *to = out + r * stride + 16 * j;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(v, _mm512_loadu_ps(to)) : v);
        }
    }
}

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

/* ---- a decoder's attention: 16-bit queries and counts are split into two bytes, with one VPDPBUSD each ---- */

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
            h[g] = _mm512_dpbusd_epi32(h[g], k, _mm512_set1_epi32(h4));
            l[g] = _mm512_dpbusd_epi32(l[g], k, _mm512_set1_epi32(l4));
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
                    h[i] = _mm512_dpbusd_epi32(h[i], _mm512_set1_epi32(h4[j]), bytes);
                    l[i] = _mm512_dpbusd_epi32(l[i], _mm512_set1_epi32(l4[j]), bytes);
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
            sum[r][0] = _mm512_dpwssd_epi32(sum[r][0], p, v0);
            sum[r][1] = _mm512_dpwssd_epi32(sum[r][1], p, v1);
        }
    }
}

#include "causal_avx512vnni.h"
#include "table.h"
