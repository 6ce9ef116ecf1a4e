/* Kernels for 64-bit Arm CPUs without products of bytes that sum in 32 bits: those before Armv8.2, such as Cortex-A72. */
#include "neon.h"

#define NAME "neon"
#define TABLE kernels_neon

/* ---- linear layers: magnitudes of weights (up to 128) times those of activations (up to 127), twice, fit 16 bits ---- */

/* Compute a tile's columns, 4 for each of ``vectors`` vectors from ``part`` on. A sum has two lanes for each column. */
INLINE void columns_int8(const int rows, const int vectors, int part, const int8_t *x, int64_t wide, const float *step,
                         const Linear *l, int first, int add, float *out, int64_t stride, const int8_t *ahead, int apart) {
    int quads = (l->in + 3) / 4, column = 4 * vectors * part;
    const int8_t *w = (const int8_t *)l->weight + (int64_t)first * quads * 4 + 4 * column;
    int32x4_t s[MOST_ROWS][8][2];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++) s[r][j][0] = s[r][j][1] = vdupq_n_s32(0);
    for (int k = 0; k < quads; k += 2, w += 8 * PANEL) {
        int8x8_t even[MOST_ROWS], odd[MOST_ROWS];
        __builtin_prefetch(ahead + (int64_t)k * apart);
        __builtin_prefetch(ahead + (int64_t)(k + 1) * apart);
        for (int r = 0; r < rows; r++) {
            int8x8_t eight = vld1_s8(x + r * wide + 4 * k); /* rows are padded to 64 */
            even[r] = vreinterpret_s8_s32(vdup_lane_s32(vreinterpret_s32_s8(eight), 0));
            odd[r] = vreinterpret_s8_s32(vdup_lane_s32(vreinterpret_s32_s8(eight), 1));
        }
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) {
            int8x16_t a = vld1q_s8(w + 16 * j), b = k + 1 < quads ? vld1q_s8(w + 4 * PANEL + 16 * j) : vdupq_n_s8(0);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(a), even[r]), vget_low_s8(b), odd[r]);
                int16x8_t high = vmlal_s8(vmull_s8(vget_high_s8(a), even[r]), vget_high_s8(b), odd[r]);
                s[r][j][0] = vpadalq_s16(s[r][j][0], low);
                s[r][j][1] = vpadalq_s16(s[r][j][1], high);
            }
        }
    }
    for (int j = 0; j < vectors; j++)
        for (int r = 0; r < rows; r++) {
            int at = column + 4 * j;
            int32x4_t sum = vpaddq_s32(s[r][j][0], s[r][j][1]);
            put_products(out + r * stride + at, sum, l->scale + first + at, l->bias + first + at, step[r], add);
        }
}

INLINE void tile_int8(const int rows, const uint8_t *x, int64_t wide, const float *step, const Linear *l, int first, int add,
                      float *out, int64_t stride, const int8_t *ahead, int apart) {
    const int vectors = rows == 1 ? 8 : rows <= 3 ? 4 : 2; /* sums take up to 24 of the 32 registers */
    const int parts = PANEL / 4 / vectors, each = (apart + parts - 1) / parts;
    for (int part = 0; part < parts; part++, ahead += (int64_t)each * ((l->in + 3) / 4))
        columns_int8(rows, vectors, part, (const int8_t *)x, wide, step, l, first, add, out, stride, ahead, each);
}

/* ---- a decoder's attention ---- */

typedef struct { int16_t v[256]; } Query;

INLINE void put_query(Query *q, int i, Ints v) { i_put_shorts(q->v + i, v); }

/* Add up the lanes of each of 4 sums. */
INLINE int32x4_t sum_lanes(const int32x4_t *s) { return vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3])); }

/* Set ``product[g]`` to a query's products with 16 keys, too high by 128 x the query's sum. In heads of up to 256 values,
 * sums fit 32 bits. Prefetches the values of the same positions. */
INLINE void key_products(const int heads, const Query *q, const int8_t *keys, int64_t keys_apart, int padded,
                         const int8_t *values, int64_t values_apart, Floats *product) {
    for (int g = 0; g < heads; g++) {
        int32x4_t s[16];
        for (int j = 0; j < 16; j++) s[j] = vdupq_n_s32(0);
        for (int i = 0; i < padded / 4; i++) {
            const uint8_t *k = (const uint8_t *)keys + g * keys_apart + 64 * i;
            int16x4_t four = vld1_s16(q[g].v + 4 * i);
            __builtin_prefetch(values + g * values_apart + 64 * i);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                uint8x16_t bytes = vld1q_u8(k + 16 * j);
                int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
                int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
                s[4 * j] = vmlal_s16(s[4 * j], vget_low_s16(low), four);
                s[4 * j + 1] = vmlal_s16(s[4 * j + 1], vget_high_s16(low), four);
                s[4 * j + 2] = vmlal_s16(s[4 * j + 2], vget_low_s16(high), four);
                s[4 * j + 3] = vmlal_s16(s[4 * j + 3], vget_high_s16(high), four);
            }
        }
        EACH product[g].v[i] = vcvtq_f32_s32(sum_lanes(s + 4 * i));
    }
}

/* Write 16 counts as 16 bits each. */
INLINE void widen_counts(int16_t *to, uint8x16_t counts) {
    vst1q_s16(to, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(counts))));
    vst1q_s16(to + 8, vreinterpretq_s16_u16(vmovl_high_u8(counts)));
}

/* Multiply values by counts, for 16 values of a head. The product of a value and a byte fits 16 bits. */
INLINE void gather_part(const uint8_t *p, const int8_t *values, int padded, const int32_t *table, int64_t stride, int n,
                        float worth, float *out, int size) {
    int32x4_t h[8], l[8]; /* two lanes for each value */
    for (int i = 0; i < 8; i++) h[i] = l[i] = vdupq_n_s32(0);
    for (int t = 0; t < n; t += 16)
        EACH_SLOT(t) {
            int16_t highs[16], lows[16];
            widen_counts(highs, some_counts(p + COUNT_BYTES * t, its));
            widen_counts(lows, some_counts(p + COUNT_BYTES * t + 16, its));
            const int8_t *v = values + from * padded;
            for (int j = 0; j < 4 && t + 4 * j < n; j++, v += 4 * padded) {
                int16x4_t four = vld1_s16(highs + 4 * j);
                int16x8_t high = vcombine_s16(four, four);
                four = vld1_s16(lows + 4 * j);
                int16x8_t low = vcombine_s16(four, four);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    int8x16_t x = vld1q_s8(v + 16 * i);
                    int16x8_t a = vmovl_s8(vget_low_s8(x)), b = vmovl_high_s8(x);
                    h[2 * i] = vpadalq_s16(h[2 * i], vmulq_s16(a, high));
                    h[2 * i + 1] = vpadalq_s16(h[2 * i + 1], vmulq_s16(b, high));
                    l[2 * i] = vpadalq_s16(l[2 * i], vmulq_s16(a, low));
                    l[2 * i + 1] = vpadalq_s16(l[2 * i + 1], vmulq_s16(b, low));
                }
            }
        }
    EACH put_gathered(out + 4 * i, vpaddq_s32(h[2 * i], h[2 * i + 1]), vpaddq_s32(l[2 * i], l[2 * i + 1]), worth, size - 4 * i);
}

INLINE void gather(const int parts, const uint8_t *p, const int8_t *values, int padded, const int32_t *table, int64_t stride,
                   int n, float worth, float *out, int size) {
    for (int i = 0; i < parts; i++)
        gather_part(p, values + 64 * i, padded, table, stride, n, worth, out + 16 * i, size - 16 * i);
}

/* ---- language models ---- */

/* Compute 4 columns for each of ``vectors`` vectors from ``part`` on. A sum has two lanes for each column. Twice a weight times
 * an activation, both up to 127, fits 16 bits. */
INLINE void some_bytes(const int rows, const int vectors, int part, const uint8_t *x, int64_t stride, const float *steps,
                       int64_t apart, const Matrix *m, int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    int column = 4 * vectors * part;
    const int8_t *w = (const int8_t *)m->weight + panel * panel_bytes(m) + 4 * column;
    const char *next = ahead.at;
    int32x4_t s[MOST_ROWS][4][2];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++) s[r][j][0] = s[r][j][1] = vdupq_n_s32(0);
    for (int b = 0; b < blocks_of(m->in); b++) {
        next = prefetch(next, ahead.lines);
        for (int k = 0; k < BLOCK / 8; k++, w += 8 * COLUMNS, x += 8) {
            int8x8_t even[MOST_ROWS], odd[MOST_ROWS];
            for (int r = 0; r < rows; r++) {
                int32x2_t eight = vreinterpret_s32_s8(vld1_s8((const int8_t *)x + r * stride));
                even[r] = vreinterpret_s8_s32(vdup_lane_s32(eight, 0));
                odd[r] = vreinterpret_s8_s32(vdup_lane_s32(eight, 1));
            }
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) {
                int8x16_t a = vld1q_s8(w + 16 * j), c = vld1q_s8(w + 4 * COLUMNS + 16 * j);
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++) {
                    int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(a), even[r]), vget_low_s8(c), odd[r]);
                    int16x8_t high = vmlal_s8(vmull_s8(vget_high_s8(a), even[r]), vget_high_s8(c), odd[r]);
                    s[r][j][0] = vpadalq_s16(s[r][j][0], low);
                    s[r][j][1] = vpadalq_s16(s[r][j][1], high);
                }
            }
        }
    }
    const float *scale = (const float *)m->scale + panel * COLUMNS + column, *bias = m->bias + panel * COLUMNS + column;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++) {
            int32x4_t sum = vpaddq_s32(s[r][j][0], s[r][j][1]);
            put_products(out + r * out_stride + column + 4 * j, sum, scale + 4 * j, bias + 4 * j, steps[r * apart], add);
        }
}

INLINE void tile_bytes(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                       int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    const int vectors = rows == 1 ? 4 : rows <= 3 ? 2 : 1;
    for (int part = 0; part < 4 / vectors; part++, ahead.lines = 0)
        some_bytes(rows, vectors, part, x, stride, steps, apart, m, panel, add, out, out_stride, ahead);
}

/* Compute 4 columns. The sum of a block's 8 products of up to 15 by up to 127 fits 16 bits. */
INLINE void four_nibbles(const int rows, int four, const uint8_t *x, int64_t stride, const float *steps, int64_t apart,
                         const Matrix *m, int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    int blocks = blocks_of(m->in);
    int64_t first = (int64_t)panel * blocks * COLUMNS + 4 * four;
    const uint8_t *w = (const uint8_t *)m->weight + panel * panel_bytes(m) + 16 * four;
    const uint16_t *scales = (const uint16_t *)m->scale + first, *lows = m->low + first;
    const char *next = ahead.at;
    float32x4_t sum[MOST_ROWS];
    for (int r = 0; r < rows; r++) sum[r] = vdupq_n_f32(0.0f);
    for (int b = 0; b < blocks; b++, x += BLOCK, scales += COLUMNS, lows += COLUMNS) {
        int16x8_t s[MOST_ROWS][2];
        next = prefetch(next, ahead.lines);
        for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = vdupq_n_s16(0);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++, w += 4 * COLUMNS) {
            uint8x16_t two = vld1q_u8(w);
            int8x16_t low = vreinterpretq_s8_u8(vandq_u8(two, vdupq_n_u8(15))), high = vreinterpretq_s8_u8(vshrq_n_u8(two, 4));
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                const int32_t *its = (const int32_t *)(x + r * stride) + k;
                int8x8_t a = vreinterpret_s8_s32(vld1_dup_s32(its)), c = vreinterpret_s8_s32(vld1_dup_s32(its + 4));
                s[r][0] = vmlal_s8(vmlal_s8(s[r][0], vget_low_s8(low), a), vget_low_s8(high), c);
                s[r][1] = vmlal_s8(vmlal_s8(s[r][1], vget_high_s8(low), a), vget_high_s8(high), c);
            }
        }
        float32x4_t scale = four_bfloat16(scales), minimum = four_bfloat16(lows);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32x4_t product = vpaddq_s32(vpaddlq_s16(s[r][0]), vpaddlq_s16(s[r][1]));
            sum[r] = add_block(sum[r], product, scale, minimum, steps[r * apart + b], steps[r * apart + blocks + b]);
        }
    }
    float32x4_t bias = vld1q_f32(m->bias + panel * COLUMNS + 4 * four);
    for (int r = 0; r < rows; r++) put(out + r * out_stride + 4 * four, vaddq_f32(sum[r], bias), add);
}

INLINE void tile_nibbles(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                         int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    for (int four = 0; four < 4; four++, ahead.lines = 0)
        four_nibbles(rows, four, x, stride, steps, apart, m, panel, add, out, out_stride, ahead);
}

#include "table.h"
