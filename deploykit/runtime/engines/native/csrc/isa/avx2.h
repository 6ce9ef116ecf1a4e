/* Operations on 16 values, for x86-64 CPUs with AVX2 and FMA. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "../kernels.h"

typedef struct { __m256 a, b; } Floats;
typedef struct { __m256i a, b; } Ints;

static const int32_t ONES_THEN_ZEROS[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
static const int32_t BITS[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};

/* Masks of the first ``left`` of 16 lanes. */
INLINE Ints first_of(int left) {
    const int32_t *from = ONES_THEN_ZEROS + 16 - (left >= 16 ? 16 : left > 0 ? left : 0);
    return (Ints){_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)(from + 8))};
}

INLINE Floats f_zero(void) { return (Floats){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats f_set(float x) { return (Floats){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats f_load(const float *x) { return (Floats){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
INLINE Floats f_load_some(const float *x, int left) {
    if (left >= 16) return f_load(x);
    Ints mask = first_of(left);
    return (Floats){_mm256_maskload_ps(x, mask.a), _mm256_maskload_ps(x + 8, mask.b)};
}
INLINE void f_store(float *to, Floats x) {
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
}
INLINE void f_store_some(float *to, Floats x, int left) {
    if (left >= 16) {
        f_store(to, x);
        return;
    }
    Ints mask = first_of(left);
    _mm256_maskstore_ps(to, mask.a, x.a);
    _mm256_maskstore_ps(to + 8, mask.b, x.b);
}
INLINE Floats f_first(Floats x, int left) {
    if (left >= 16) return x;
    Ints mask = first_of(left);
    return (Floats){_mm256_and_ps(x.a, _mm256_castsi256_ps(mask.a)), _mm256_and_ps(x.b, _mm256_castsi256_ps(mask.b))};
}
INLINE Floats f_blend(Ints mask, Floats a, Floats b) {
    return (Floats){_mm256_blendv_ps(a.a, b.a, _mm256_castsi256_ps(mask.a)),
                    _mm256_blendv_ps(a.b, b.b, _mm256_castsi256_ps(mask.b))};
}
INLINE Floats f_load_or(const float *x, int left, float other) {
    return left >= 16 ? f_load(x) : f_blend(first_of(left), f_set(other), f_load_some(x, left));
}
INLINE Floats f_select(uint32_t mask, Floats a, Floats b) {
    if (mask == 0xffff) return b;
    __m256i all = _mm256_set1_epi32((int)mask), low = _mm256_loadu_si256((const __m256i *)BITS);
    __m256i high = _mm256_loadu_si256((const __m256i *)(BITS + 8));
    return f_blend((Ints){_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low),
                          _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high)}, a, b);
}
INLINE Floats f_where_positive(Floats x, Floats y) {
    __m256 zero = _mm256_setzero_ps();
    return (Floats){_mm256_and_ps(_mm256_cmp_ps(x.a, zero, _CMP_GT_OQ), y.a),
                    _mm256_and_ps(_mm256_cmp_ps(x.b, zero, _CMP_GT_OQ), y.b)};
}
INLINE Floats f_add(Floats a, Floats b) { return (Floats){_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
INLINE Floats f_sub(Floats a, Floats b) { return (Floats){_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
INLINE Floats f_mul(Floats a, Floats b) { return (Floats){_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
INLINE Floats f_div(Floats a, Floats b) { return (Floats){_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
INLINE Floats f_fma(Floats a, Floats b, Floats c) {
    return (Floats){_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
INLINE Floats f_fms(Floats a, Floats b, Floats c) {
    return (Floats){_mm256_fmsub_ps(a.a, b.a, c.a), _mm256_fmsub_ps(a.b, b.b, c.b)};
}
INLINE Floats f_max(Floats a, Floats b) { return (Floats){_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
INLINE Floats f_min(Floats a, Floats b) { return (Floats){_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
INLINE Floats f_abs(Floats x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (Floats){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE __m256 eight_fraction(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-300.0f)); /* avoids subtracting from minus infinity */
    return _mm256_sub_ps(x, _mm256_floor_ps(x));
}
INLINE Floats f_fraction(Floats x) { return (Floats){eight_fraction(x.a), eight_fraction(x.b)}; }

/* x 2^floor(y), in two factors: one float cannot hold all powers, and only the last product may round. */
INLINE __m256 eight_scale(__m256 x, __m256 y) {
    y = _mm256_max_ps(_mm256_min_ps(y, _mm256_set1_ps(252.0f)), _mm256_set1_ps(-252.0f));
    __m256i n = _mm256_cvtps_epi32(_mm256_floor_ps(y)), half = _mm256_srai_epi32(n, 1), one = _mm256_set1_epi32(127);
    __m256i rest = _mm256_sub_epi32(n, half);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23)));
}
INLINE Floats f_scale(Floats x, Floats y) { return (Floats){eight_scale(x.a, y.a), eight_scale(x.b, y.b)}; }

INLINE uint32_t f_greater(Floats x, float y) {
    __m256 all = _mm256_set1_ps(y);
    return (uint32_t)(_mm256_movemask_ps(_mm256_cmp_ps(x.a, all, _CMP_GT_OQ)) |
                      _mm256_movemask_ps(_mm256_cmp_ps(x.b, all, _CMP_GT_OQ)) << 8);
}
INLINE float f_highest(Floats x) {
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE float f_sum(Floats x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

INLINE __m256 transform_eight(__m256 x) {
    __m256 y = _mm256_permute_ps(x, 0xb1);
    x = _mm256_blend_ps(_mm256_add_ps(y, x), _mm256_sub_ps(y, x), 0xaa);
    y = _mm256_permute_ps(x, 0x4e);
    x = _mm256_blend_ps(_mm256_add_ps(y, x), _mm256_sub_ps(y, x), 0xcc);
    y = _mm256_permute2f128_ps(x, x, 1);
    return _mm256_blend_ps(_mm256_add_ps(y, x), _mm256_sub_ps(y, x), 0xf0);
}
/* The Hadamard transform of 16 values. */
INLINE Floats f_transform(Floats x) {
    __m256 a = transform_eight(x.a), b = transform_eight(x.b);
    return (Floats){_mm256_add_ps(a, b), _mm256_sub_ps(a, b)};
}

INLINE void transpose_eight(__m256 x[8]) {
    __m256 y[8], z[8];
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            z[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
            z[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(z[i], z[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(z[i], z[i + 4], 0x31);
    }
}
INLINE void f_transpose(Floats x[16]) {
    __m256 q[4][8]; /* quarters: rows 0-7 left, right; rows 8-15 left, right */
    for (int i = 0; i < 8; i++) {
        q[0][i] = x[i].a;
        q[1][i] = x[i].b;
        q[2][i] = x[i + 8].a;
        q[3][i] = x[i + 8].b;
    }
    for (int i = 0; i < 4; i++) transpose_eight(q[i]);
    for (int i = 0; i < 8; i++) {
        x[i] = (Floats){q[0][i], q[2][i]};
        x[i + 8] = (Floats){q[1][i], q[3][i]};
    }
}

INLINE Ints f_bits(Floats x) { return (Ints){_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
INLINE Floats f_from(Ints x) { return (Floats){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE __m256 eight_lookup(const float *table, __m256i i) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
INLINE Floats f_lookup(const float *table, Ints i) { return (Floats){eight_lookup(table, i.a), eight_lookup(table, i.b)}; }

INLINE Ints i_zero(void) { return (Ints){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE Ints i_set(int32_t x) { return (Ints){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Ints i_round(Floats x) { return (Ints){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE Ints i_add(Ints a, Ints b) { return (Ints){_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
INLINE int32_t i_sum(Ints x) {
    __m256i eight = _mm256_add_epi32(x.a, x.b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
INLINE __m256i eight_pair(__m256i a, __m256i b) {
    return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
}
INLINE Ints i_pair(Ints a, Ints b) { return (Ints){eight_pair(a.a, b.a), eight_pair(a.b, b.b)}; }
INLINE uint32_t i_equal(const int32_t *x, int32_t y) {
    __m256i all = _mm256_set1_epi32(y);
    __m256i a = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i *)x), all);
    __m256i b = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i *)(x + 8)), all);
    return (uint32_t)(_mm256_movemask_ps(_mm256_castsi256_ps(a)) | _mm256_movemask_ps(_mm256_castsi256_ps(b)) << 8);
}
INLINE Ints i_load_bytes(const int8_t *x, int left) {
    int8_t some[16] = {0};
    if (left < 16) memcpy(some, x, left > 0 ? (size_t)left : 0);
    __m128i bytes = _mm_loadu_si128((const __m128i *)(left < 16 ? some : x));
    return (Ints){_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
INLINE void i_store(void *to, Ints x) {
    _mm256_storeu_si256(to, x.a);
    _mm256_storeu_si256((__m256i *)to + 1, x.b);
}
/* The low 16 bits of each. */
INLINE __m256i shorts_of(Ints x) {
    __m256i mask = _mm256_set1_epi32(0xffff);
    __m256i packed = _mm256_packus_epi32(_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}
INLINE Ints i_swap_middle(Ints x) { return (Ints){_mm256_shuffle_epi32(x.a, 0xd8), _mm256_shuffle_epi32(x.b, 0xd8)}; }
INLINE void i_put_shorts(void *to, Ints x) { _mm256_storeu_si256(to, shorts_of(x)); }
INLINE void i_put_bytes(void *to, Ints x) {
    __m256i shorts = _mm256_and_si256(shorts_of(x), _mm256_set1_epi16(0xff));
    _mm_storeu_si128(to, _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
}
INLINE void i_put_every_fourth_byte(int8_t *to, Ints x, int place) {
    __m256i mask = _mm256_set1_epi32((int32_t)(0xffu << place * 8)), *at = (__m256i *)to;
    __m128i by = _mm_cvtsi32_si128(place * 8);
    _mm256_storeu_si256(at, _mm256_blendv_epi8(_mm256_loadu_si256(at), _mm256_sll_epi32(x.a, by), mask));
    _mm256_storeu_si256(at + 1, _mm256_blendv_epi8(_mm256_loadu_si256(at + 1), _mm256_sll_epi32(x.b, by), mask));
}
