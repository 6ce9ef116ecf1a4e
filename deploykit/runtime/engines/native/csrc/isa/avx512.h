/* Operations on 16 values, for x86-64 CPUs with AVX-512 F, BW, DQ and VL. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "../kernels.h"

typedef __m512 Floats;
typedef __m512i Ints;

#define SEEN_QUERIES 12

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
/* VREDUCEPS would round the difference down. The minimum replaces the NaN of an infinity, whose fraction does not matter. */
INLINE Floats f_fraction(Floats x) {
    return _mm512_min_ps(_mm512_sub_ps(x, _mm512_roundscale_ps(x, _MM_FROUND_FLOOR)), _mm512_set1_ps(1.0f));
}
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

/* The sum of two vectors, and in the lanes of ``less`` their difference. */
INLINE Floats sum_or_difference(Floats a, Floats b, __mmask16 less) {
    return _mm512_mask_sub_ps(_mm512_add_ps(a, b), less, a, b);
}
/* The Hadamard transform of 16 values. */
INLINE Floats f_transform(Floats x) {
    x = sum_or_difference(_mm512_permute_ps(x, 0xb1), x, 0xaaaa);
    x = sum_or_difference(_mm512_permute_ps(x, 0x4e), x, 0xcccc);
    x = sum_or_difference(_mm512_shuffle_f32x4(x, x, 0xb1), x, 0xf0f0);
    return sum_or_difference(_mm512_shuffle_f32x4(x, x, 0x4e), x, 0xff00);
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
INLINE Ints i_swap_middle(Ints x) { return _mm512_shuffle_epi32(x, 0xd8); }
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

/* Write a tile's integer sums as float32: [rows][64], times the scales, + bias. */
INLINE void put_products(const int rows, Ints s[][4], const Linear *l, int first, const float *step, int add, float *out,
                         int64_t stride) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        Floats scale = f_load(l->scale + first + 16 * j), bias = f_load(l->bias + first + 16 * j);
        for (int r = 0; r < rows; r++) {
            Floats v = f_fma(f_from(s[r][j]), f_mul(scale, f_set(step[r])), bias);
            float *to = out + r * stride + 16 * j;
            f_store(to, add ? f_add(v, f_load(to)) : v);
        }
    }
}
