/* Common parts of the instruction sets of 64-bit Arm CPUs: operations on 16 values, and products that no instruction for
 * bytes speeds up. Every such CPU has these instructions. */
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "../kernels.h"

#define ZERO 0

typedef struct { float32x4_t v[4]; } Floats;
typedef struct { int32x4_t v[4]; } Ints;

#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
#define FLOATS(expression) Floats r; EACH r.v[i] = (expression); return r
#define INTS(expression) Ints r; EACH r.v[i] = (expression); return r

static const uint32_t ONES_THEN_ZEROS[32] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
static const uint32_t BITS[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                  1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};

/* Masks of the first ``left`` of 16 lanes. */
INLINE const uint32_t *first_of(int left) { return ONES_THEN_ZEROS + 16 - (left >= 16 ? 16 : left > 0 ? left : 0); }

INLINE Floats f_set(float x) { FLOATS(vdupq_n_f32(x)); }
INLINE Floats f_zero(void) { return f_set(0.0f); }
INLINE Floats f_load(const float *x) { FLOATS(vld1q_f32(x + 4 * i)); }
INLINE void f_store(float *to, Floats x) { EACH vst1q_f32(to + 4 * i, x.v[i]); }
INLINE Floats f_load_or(const float *x, int left, float other) {
    float some[16];
    if (left >= 16) return f_load(x);
    f_store(some, f_set(other));
    if (left > 0) memcpy(some, x, sizeof(float) * (size_t)left);
    return f_load(some);
}
INLINE Floats f_load_some(const float *x, int left) { return f_load_or(x, left, 0.0f); }
INLINE void f_store_some(float *to, Floats x, int left) {
    float some[16];
    if (left >= 16) {
        f_store(to, x);
    } else if (left > 0) {
        f_store(some, x);
        memcpy(to, some, sizeof(float) * (size_t)left);
    }
}
INLINE float32x4_t and_mask(uint32x4_t mask, float32x4_t x) {
    return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(x)));
}
INLINE Floats f_first(Floats x, int left) {
    if (left >= 16) return x;
    FLOATS(and_mask(vld1q_u32(first_of(left) + 4 * i), x.v[i]));
}
INLINE Floats f_select(uint32_t mask, Floats a, Floats b) {
    FLOATS(vbslq_f32(vtstq_u32(vdupq_n_u32(mask), vld1q_u32(BITS + 4 * i)), b.v[i], a.v[i]));
}
INLINE Floats f_where_positive(Floats x, Floats y) { FLOATS(and_mask(vcgtzq_f32(x.v[i]), y.v[i])); }
INLINE Floats f_add(Floats a, Floats b) { FLOATS(vaddq_f32(a.v[i], b.v[i])); }
INLINE Floats f_sub(Floats a, Floats b) { FLOATS(vsubq_f32(a.v[i], b.v[i])); }
INLINE Floats f_mul(Floats a, Floats b) { FLOATS(vmulq_f32(a.v[i], b.v[i])); }
INLINE Floats f_div(Floats a, Floats b) { FLOATS(vdivq_f32(a.v[i], b.v[i])); }
INLINE Floats f_fma(Floats a, Floats b, Floats c) { FLOATS(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
INLINE Floats f_fms(Floats a, Floats b, Floats c) { FLOATS(vfmaq_f32(vnegq_f32(c.v[i]), a.v[i], b.v[i])); }
/* FMAX and FMIN differ from the reference if a value is not a number, or if both are zeros. */
INLINE Floats f_max(Floats a, Floats b) { FLOATS(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
INLINE Floats f_min(Floats a, Floats b) { FLOATS(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
INLINE Floats f_abs(Floats x) { FLOATS(vabsq_f32(x.v[i])); }
INLINE float32x4_t four_fraction(float32x4_t x) {
    x = vmaxq_f32(x, vdupq_n_f32(-300.0f)); /* avoids subtracting from minus infinity */
    return vsubq_f32(x, vrndmq_f32(x));
}
INLINE Floats f_fraction(Floats x) { FLOATS(four_fraction(x.v[i])); }

/* x 2^floor(y), in two factors: one float cannot hold all powers, and only the last product may round. */
INLINE float32x4_t four_scale(float32x4_t x, float32x4_t y) {
    y = vmaxq_f32(vminq_f32(y, vdupq_n_f32(252.0f)), vdupq_n_f32(-252.0f));
    int32x4_t n = vcvtmq_s32_f32(y), half = vshrq_n_s32(n, 1), rest = vsubq_s32(n, half), one = vdupq_n_s32(127);
    x = vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, one), 23)));
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, one), 23)));
}
INLINE Floats f_scale(Floats x, Floats y) { FLOATS(four_scale(x.v[i], y.v[i])); }

INLINE uint32_t f_greater(Floats x, float y) {
    uint32x4_t mask = vdupq_n_u32(0);
    EACH mask = vorrq_u32(mask, vandq_u32(vcgtq_f32(x.v[i], vdupq_n_f32(y)), vld1q_u32(BITS + 4 * i)));
    return vaddvq_u32(mask);
}
INLINE float f_highest(Floats x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
INLINE float f_sum(Floats x) {
    float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
/* The Hadamard transform of 16 values. */
INLINE Floats f_transform(Floats x) {
    EACH {
        float32x4_t v = x.v[i], other = vrev64q_f32(v);
        v = vtrn1q_f32(vaddq_f32(v, other), vsubq_f32(v, other));
        other = vextq_f32(v, v, 2);
        x.v[i] = vcombine_f32(vget_low_f32(vaddq_f32(v, other)), vget_low_f32(vsubq_f32(v, other)));
    }
    Floats y = {{vaddq_f32(x.v[0], x.v[1]), vsubq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]), vsubq_f32(x.v[2], x.v[3])}};
    return (Floats){{vaddq_f32(y.v[0], y.v[2]), vaddq_f32(y.v[1], y.v[3]), vsubq_f32(y.v[0], y.v[2]), vsubq_f32(y.v[1], y.v[3])}};
}
INLINE void f_transpose(Floats x[16]) {
    float rows[16][16];
    for (int i = 0; i < 16; i += 4) /* a load of four structures transposes: lane l of vector c is value 4 l + c */
        for (int j = 0; j < 4; j++) {
            float block[16];
            for (int k = 0; k < 4; k++) vst1q_f32(block + 4 * k, x[i + k].v[j]);
            float32x4x4_t columns = vld4q_f32(block);
            for (int k = 0; k < 4; k++) vst1q_f32(rows[4 * j + k] + i, columns.val[k]);
        }
    for (int i = 0; i < 16; i++) x[i] = f_load(rows[i]);
}

INLINE Ints f_bits(Floats x) { INTS(vreinterpretq_s32_f32(x.v[i])); }
INLINE Floats f_from(Ints x) { FLOATS(vcvtq_f32_s32(x.v[i])); }
INLINE Floats f_lookup(const float *table, Ints at) {
    const uint8_t *t = (const uint8_t *)table;
    const uint8x16x4_t bytes = {{vld1q_u8(t), vld1q_u8(t + 16), vld1q_u8(t + 32), vld1q_u8(t + 48)}};
    const uint32x4_t last = vdupq_n_u32(15), each = vdupq_n_u32(0x03020100);
    FLOATS(vreinterpretq_f32_u8(vqtbl4q_u8(
        bytes, vreinterpretq_u8_u32(vmlaq_n_u32(each, vandq_u32(vreinterpretq_u32_s32(at.v[i]), last), 0x04040404)))));
}

INLINE Ints i_set(int32_t x) { INTS(vdupq_n_s32(x)); }
INLINE Ints i_zero(void) { return i_set(0); }
INLINE Ints i_round(Floats x) { INTS(vcvtnq_s32_f32(x.v[i])); }
INLINE Ints i_add(Ints a, Ints b) { INTS(vaddq_s32(a.v[i], b.v[i])); }
INLINE int32_t i_sum(Ints x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }
INLINE Ints i_pair(Ints a, Ints b) { INTS(vsliq_n_s32(a.v[i], b.v[i], 16)); }
INLINE uint32_t i_equal(const int32_t *x, int32_t y) {
    uint32x4_t mask = vdupq_n_u32(0);
    EACH mask = vorrq_u32(mask, vandq_u32(vceqq_s32(vld1q_s32(x + 4 * i), vdupq_n_s32(y)), vld1q_u32(BITS + 4 * i)));
    return vaddvq_u32(mask);
}
INLINE Ints i_load_bytes(const int8_t *x, int left) {
    int8_t some[16] = {0};
    if (left < 16) memcpy(some, x, left > 0 ? (size_t)left : 0);
    int8x16_t bytes = vld1q_s8(left < 16 ? some : x);
    int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return (Ints){{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}
INLINE void i_store(void *to, Ints x) { EACH vst1q_s32((int32_t *)to + 4 * i, x.v[i]); }
/* The low 16 bits of 8 values from ``x`` on. */
INLINE int16x8_t eight_shorts(const int32x4_t *x) {
    return vuzp1q_s16(vreinterpretq_s16_s32(x[0]), vreinterpretq_s16_s32(x[1]));
}
INLINE int8x16_t bytes_of(Ints x) {
    return vuzp1q_s8(vreinterpretq_s8_s16(eight_shorts(x.v)), vreinterpretq_s8_s16(eight_shorts(x.v + 2)));
}
INLINE void i_put_shorts(void *to, Ints x) {
    vst1q_s16(to, eight_shorts(x.v));
    vst1q_s16((int16_t *)to + 8, eight_shorts(x.v + 2));
}
INLINE void i_put_bytes(void *to, Ints x) { vst1q_s8(to, bytes_of(x)); }
INLINE void i_put_every_fourth_byte(int8_t *to, Ints x, int place) {
    const uint32x4_t mask = vdupq_n_u32(0xffu << place * 8);
    const int32x4_t by = vdupq_n_s32(place * 8);
    EACH {
        int32_t *at = (int32_t *)to + 4 * i;
        vst1q_s32(at, vbslq_s32(mask, vshlq_s32(x.v[i], by), vld1q_s32(at)));
    }
}

#include "slots.h"

/* ---- ends of products ---- */

INLINE void put(float *to, float32x4_t v, int add) { vst1q_f32(to, add ? vaddq_f32(v, vld1q_f32(to)) : v); }

/* Write the products of a row with 4 columns, which have ``scale`` and ``bias``. */
INLINE void put_products(float *to, int32x4_t sum, const float *scale, const float *bias, float step, int add) {
    put(to, vfmaq_f32(vld1q_f32(bias), vcvtq_f32_s32(sum), vmulq_n_f32(vld1q_f32(scale), step)), add);
}

INLINE const char *prefetch(const char *at, int lines) {
    for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at);
    return at;
}

/* ---- linear layers ---- */

INLINE void tile_float(const int rows, const float *x, int64_t wide, const Linear *l, int first, int add, float *out,
                       int64_t stride) {
    const int vectors = rows == 1 ? 16 : rows <= 3 ? 8 : 4; /* sums take up to 24 of the 32 registers */
    for (int column = 0; column < PANEL; column += 4 * vectors) {
        const float *w = (const float *)l->weight + (int64_t)first * l->in + column;
        float32x4_t s[MOST_ROWS][16];
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < vectors; j++) s[r][j] = vdupq_n_f32(0.0f);
        for (int k = 0; k < l->in; k++, w += PANEL)
#pragma GCC unroll 16
            for (int j = 0; j < vectors; j++) {
                float32x4_t v = vld1q_f32(w + 4 * j);
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++) s[r][j] = vfmaq_n_f32(s[r][j], v, x[r * wide + k]);
            }
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < vectors; j++)
                put(out + r * stride + column + 4 * j, vaddq_f32(s[r][j], vld1q_f32(l->bias + first + column + 4 * j)), add);
    }
}

/* ---- a decoder's attention ---- */

#define COUNT_BYTES 2

/* Write the high bytes of 16 counts, then the low bytes. */
INLINE void put_counts(uint8_t *p, Ints counts) {
    int8x16_t a = vreinterpretq_s8_s16(eight_shorts(counts.v)), b = vreinterpretq_s8_s16(eight_shorts(counts.v + 2));
    vst1q_u8(p, vreinterpretq_u8_s8(vuzp2q_s8(a, b)));
    vst1q_u8(p + 16, vreinterpretq_u8_s8(vuzp1q_s8(a, b)));
}

/* Load 16 bytes of counts, and set those that are not in the mask ``its`` to 0. */
INLINE uint8x16_t some_counts(const uint8_t *p, uint32_t its) {
    static const uint8_t EIGHT[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    uint8x8_t bits = vld1_u8(EIGHT);
    uint8x16_t mask = vcombine_u8(vtst_u8(vdup_n_u8((uint8_t)its), bits), vtst_u8(vdup_n_u8((uint8_t)(its >> 8)), bits));
    return vandq_u8(vld1q_u8(p), mask);
}

/* Write a part of a head, up to 4 values, from sums of values times high and low bytes of counts. */
INLINE void put_gathered(float *to, int32x4_t high, int32x4_t low, float worth, int left) {
    float four[4];
    vst1q_f32(four, vmulq_n_f32(vfmaq_n_f32(vcvtq_f32_s32(low), vcvtq_f32_s32(high), 256.0f), worth));
    if (left > 0) memcpy(to, four, sizeof(float) * (size_t)(left < 4 ? left : 4));
}

/* ---- a classifier's attention ---- */

/* Compute ``sums`` of ``rows`` rows for 16 values of a head. */
INLINE void sixteen_sums(const int rows, const int16_t *shares, int64_t keys, const int32_t *v, int padded, int64_t pairs,
                         Ints *sums) {
    int32x4_t s[MOST_ROWS][4];
    for (int r = 0; r < rows; r++) EACH s[r][i] = vdupq_n_s32(0);
    for (int j = 0; j < pairs; j++, v += padded) {
        int16x8x2_t a = vld2q_s16((const int16_t *)v), b = vld2q_s16((const int16_t *)(v + 8));
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32_t two;
            memcpy(&two, shares + r * keys + 2 * j, 4);
            int16x4_t p = vreinterpret_s16_s32(vdup_n_s32(two));
#define ADD(number, half, from) \
    s[r][number] = vmlal_lane_s16(s[r][number], vget_##half##_s16(from.val[0]), p, 0); \
    s[r][number] = vmlal_lane_s16(s[r][number], vget_##half##_s16(from.val[1]), p, 1)
            ADD(0, low, a);
            ADD(1, high, a);
            ADD(2, low, b);
            ADD(3, high, b);
#undef ADD
        }
    }
    for (int r = 0; r < rows; r++) EACH sums[2 * r].v[i] = s[r][i];
}

/* Set ``sum`` to shares times values, for 32 values of a head. */
INLINE void value_sums(int rows, const int16_t *shares, int64_t keys, const int32_t *v, int padded, int64_t pairs,
                       Ints sum[MOST_ROWS][2]) {
    for (int j = 0; j < 2; j++)
        if (rows == 1) sixteen_sums(1, shares, keys, v + 16 * j, padded, pairs, &sum[0][j]);
        else sixteen_sums(MOST_ROWS, shares, keys, v + 16 * j, padded, pairs, &sum[0][j]); /* unused rows are not read */
}

/* ---- language models ---- */

INLINE Floats f_load_halves(const uint16_t *x) { FLOATS(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + 4 * i)))); }
INLINE void f_store_halves(uint16_t *to, Floats x) {
    EACH vst1_u16(to + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}

INLINE float32x4_t four_bfloat16(const uint16_t *x) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16)); }

/* Add a block's products, of a row with 4 columns, to ``sum``. */
INLINE float32x4_t add_block(float32x4_t sum, int32x4_t product, float32x4_t scale, float32x4_t low, float step, float low_step) {
    sum = vfmaq_n_f32(sum, vmulq_f32(vcvtq_f32_s32(product), scale), step);
    return vfmaq_n_f32(sum, low, low_step);
}

INLINE void tile_floats(const int rows, const uint8_t *x, int64_t stride, const Matrix *m, int panel, int add, float *out,
                        int64_t out_stride) {
    const float *w = (const float *)((const char *)m->weight + panel * panel_bytes(m)), *bias = m->bias + panel * COLUMNS;
    float32x4_t s[MOST_ROWS][4];
    for (int r = 0; r < rows; r++) EACH s[r][i] = vdupq_n_f32(0.0f);
    for (int k = 0; k < m->in; k++, w += COLUMNS)
        EACH {
            float32x4_t v = vld1q_f32(w + 4 * i);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) s[r][i] = vfmaq_n_f32(s[r][i], v, ((const float *)(x + r * stride))[k]);
        }
    for (int r = 0; r < rows; r++) EACH put(out + r * out_stride + 4 * i, vaddq_f32(s[r][i], vld1q_f32(bias + 4 * i)), add);
}
