/* Kernels for 64-bit Arm CPUs with products of byte matrices (FEAT_I8MM), such as Neoverse V1 and N2.
 *
 * SMMLA multiplies two rows by two columns of eight inputs.
 *
 * Source: Arm, "Arm Architecture Reference Manual for A-profile architecture", SMMLA (vector). */
#define NAME "i8mm"
#define TABLE kernels_i8mm
#define UNSIGNED 1

#include "dotprod.h"

#define EACH_PAIR _Pragma("GCC unroll 3") for (int p = 0; p < pairs; p++)

/* Compute 16 columns from ``part`` on, for ``rows`` rows in pairs; the last row is its own pair if they are odd. */
INLINE void columns_matrix(const int rows, int part, const int8_t *x, int64_t wide, const float *step, const Linear *l,
                           int first, int add, float *out, int64_t stride, const int8_t *ahead, int apart) {
    const int pairs = (rows + 1) / 2;
    int quads = (l->in + 3) / 4, column = 16 * part;
    const int8_t *w = (const int8_t *)l->weight + (int64_t)first * quads * 4 + 4 * column;
    int32x4_t s[MOST_ROWS / 2][8]; /* two columns of the first row, then of the second */
    int8x16_t two[MOST_ROWS / 2];
    EACH_PAIR
        _Pragma("GCC unroll 8") for (int j = 0; j < 8; j++) s[p][j] = vdupq_n_s32(0);
    int k = 0;
#define EIGHT_INPUTS(last_four) \
    EACH_PAIR { \
        const int8_t *row = x + 2 * p * wide + 4 * k; /* rows are padded to 64 */ \
        two[p] = vcombine_s8(vld1_s8(row), vld1_s8(2 * p + 1 < rows ? row + wide : row)); \
    } \
    EACH { \
        int32x4_t a = vreinterpretq_s32_s8(vld1q_s8(w + 16 * i)), b = last_four; \
        int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(a, b)), high = vreinterpretq_s8_s32(vzip2q_s32(a, b)); \
        EACH_PAIR { \
            s[p][2 * i] = vmmlaq_s32(s[p][2 * i], two[p], low); \
            s[p][2 * i + 1] = vmmlaq_s32(s[p][2 * i + 1], two[p], high); \
            IN_ORDER(s[p][2 * i]); \
            IN_ORDER(s[p][2 * i + 1]); \
        } \
    }
    for (; k + 2 <= quads; k += 2, w += 8 * PANEL) {
        __builtin_prefetch(ahead + (int64_t)k * apart);
        __builtin_prefetch(ahead + (int64_t)(k + 1) * apart);
        EIGHT_INPUTS(vreinterpretq_s32_s8(vld1q_s8(w + 4 * PANEL + 16 * i)))
    }
    if (k < quads) {
        EIGHT_INPUTS(vdupq_n_s32(0))
    }
#undef EIGHT_INPUTS
    EACH_ROW
        EACH {
            int at = column + 4 * i;
            int64x2_t a = vreinterpretq_s64_s32(s[r / 2][2 * i]), b = vreinterpretq_s64_s32(s[r / 2][2 * i + 1]);
            int32x4_t sum = vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
            put_products(out + r * stride + at, sum, l->scale + first + at, l->bias + first + at, step[r], add);
        }
}

INLINE void tile_int8(const int rows, const uint8_t *x, int64_t wide, const float *step, const Linear *l, int first, int add,
                      float *out, int64_t stride, const int8_t *ahead, int apart) {
    const int each = (apart + 3) / 4;
    if (rows == 1) {
        tile_dot(1, x, wide, step, l, first, add, out, stride, ahead, apart);
        return;
    }
    for (int part = 0; part < 4; part++, ahead += (int64_t)each * ((l->in + 3) / 4))
        columns_matrix(rows, part, (const int8_t *)x, wide, step, l, first, add, out, stride, ahead, each);
}

#include "table.h"
