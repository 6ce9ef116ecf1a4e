/* Products by SDOT, which adds four products of signed bytes to each 32-bit lane, for dotprod.c and i8mm.c.
 *
 * The file that includes this one defines UNSIGNED: whether there are instructions for an unsigned and a signed byte. If there
 * are none, unsigned bytes are lowered by 128, and 128 x the sum of the others is added again. Sums wrap around at 32 bits, so
 * only the result has to fit.
 *
 * Source: Arm, "Arm Architecture Reference Manual for A-profile architecture", SDOT, SUDOT, USDOT (by element). */
#include "neon.h"

/* Repeat a lane's number, which an instruction holds, for lanes 0 to 3. */
#define EACH_LANE(use) use(0) use(1) use(2) use(3)

#if UNSIGNED
#define DOT_OF_UNSIGNED(sum, bytes, by, lane) vusdotq_laneq_s32(sum, bytes, by, lane)
#define DOT_BY_UNSIGNED(sum, bytes, by, lane) vsudotq_laneq_s32(sum, bytes, by, lane)
#else
#define DOT_OF_UNSIGNED(sum, bytes, by, lane) vdotq_laneq_s32(sum, lowered(bytes), by, lane)
#define DOT_BY_UNSIGNED(sum, bytes, by, lane) vdotq_laneq_s32(sum, bytes, lowered(by), lane)
#endif

/* Unrolled, so that sums stay in registers; and in order, because more weights loaded ahead need more registers than there are. */
#define EACH_ROW _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++)
#define IN_ORDER(x) __asm__("" : "+w"(x))

INLINE int8x16_t lowered(uint8x16_t x) { return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(128))); }
INLINE int32x4_t raised(int32x4_t sum, int32x4_t others) { return UNSIGNED ? sum : vaddq_s32(sum, vshlq_n_s32(others, 7)); }

/* ---- linear layers ---- */

/* Compute a tile's columns, 4 for each of ``vectors`` vectors from ``part`` on. ``ahead``: weights to prefetch, ``apart``
 * bytes apart for each four inputs. */
INLINE void columns_dot(const int rows, const int vectors, int part, const int8_t *x, int64_t wide, const float *step,
                        const Linear *l, int first, int add, float *out, int64_t stride, const int8_t *ahead, int apart) {
    int quads = (l->in + 3) / 4, column = 4 * vectors * part, k = 0;
    const int8_t *w = (const int8_t *)l->weight + (int64_t)first * quads * 4 + 4 * column;
    int32x4_t s[MOST_ROWS][16];
    int8x16_t sixteen[MOST_ROWS];
    EACH_ROW
        _Pragma("GCC unroll 16") for (int j = 0; j < vectors; j++) s[r][j] = vdupq_n_s32(0);
#define QUAD(lane) \
    __builtin_prefetch(ahead + (int64_t)k * apart); \
    _Pragma("GCC unroll 16") for (int j = 0; j < vectors; j++) { \
        int8x16_t four = vld1q_s8(w + 16 * j); \
        EACH_ROW { \
            s[r][j] = vdotq_laneq_s32(s[r][j], four, sixteen[r], lane); \
            IN_ORDER(s[r][j]); \
        } \
    } \
    k++, w += 4 * PANEL;
    while (k + 4 <= quads) {
        EACH_ROW sixteen[r] = vld1q_s8(x + r * wide + 4 * k);
        EACH_LANE(QUAD)
    }
    while (k < quads) {
        EACH_ROW sixteen[r] = vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(x + r * wide) + k));
        QUAD(0)
    }
#undef QUAD
    EACH_ROW
        _Pragma("GCC unroll 16") for (int j = 0; j < vectors; j++) {
            int at = column + 4 * j;
            put_products(out + r * stride + at, s[r][j], l->scale + first + at, l->bias + first + at, step[r], add);
        }
}

INLINE void tile_dot(const int rows, const uint8_t *x, int64_t wide, const float *step, const Linear *l, int first, int add,
                     float *out, int64_t stride, const int8_t *ahead, int apart) {
    const int vectors = rows == 1 ? 16 : rows <= 3 ? 8 : 4; /* sums take up to 24 of the 32 registers */
    const int parts = PANEL / 4 / vectors, each = (apart + parts - 1) / parts;
    for (int part = 0; part < parts; part++, ahead += (int64_t)each * ((l->in + 3) / 4))
        columns_dot(rows, vectors, part, (const int8_t *)x, wide, step, l, first, add, out, stride, ahead, each);
}

/* ---- a decoder's attention: 16-bit queries and counts are split into two bytes ---- */

typedef struct {
    int8_t high[256], low[256]; /* 256 high + low */
    int32_t sum;                /* unless UNSIGNED */
} Query;

INLINE void put_query(Query *q, int i, Ints v) {
    if (!UNSIGNED) q->sum = i_sum(v) + (i ? q->sum : 0);
    i_put_bytes(q->low + i, v);
    EACH v.v[i] = vshrq_n_s32(vaddq_s32(v.v[i], vdupq_n_s32(128)), 8);
    i_put_bytes(q->high + i, v);
}

/* Set ``product[g]`` to a query's products with 16 keys, too high by 128 x the query's sum. In heads of up to 256 values,
 * sums fit 32 bits. Prefetches the values of the same positions. */
INLINE void key_products(const int heads, const Query *q, const int8_t *keys, int64_t keys_apart, int padded,
                         const int8_t *values, int64_t values_apart, Floats *product) {
    for (int g = 0; g < heads; g++) {
        int32x4_t h[4], l[4];
        EACH h[i] = l[i] = vdupq_n_s32(0);
        for (int k = 0; k < padded / 4; k += 4) {
            const uint8_t *key = (const uint8_t *)keys + g * keys_apart + 64 * k;
            int8x16_t high = vld1q_s8(q[g].high + 4 * k), low = vld1q_s8(q[g].low + 4 * k);
#define QUAD(lane) \
    __builtin_prefetch(values + g * values_apart + 64 * (k + lane)); \
    EACH { \
        uint8x16_t bytes = vld1q_u8(key + 64 * lane + 16 * i); \
        h[i] = DOT_OF_UNSIGNED(h[i], bytes, high, lane); \
        l[i] = DOT_OF_UNSIGNED(l[i], bytes, low, lane); \
    }
            EACH_LANE(QUAD)
#undef QUAD
        }
        int32x4_t all = vdupq_n_s32(UNSIGNED ? 0 : q[g].sum);
        EACH product[g].v[i] = vcvtq_f32_s32(raised(vaddq_s32(vshlq_n_s32(h[i], 8), l[i]), all));
    }
}

/* Multiply values by counts, for 16 values of a head. */
INLINE void gather_part(const uint8_t *p, const int8_t *values, int padded, const int32_t *table, int64_t stride, int n,
                        float worth, float *out, int size) {
    int32x4_t h[4], l[4], all[4];
    const int8x16_t ones = vdupq_n_s8(1);
    EACH h[i] = l[i] = all[i] = vdupq_n_s32(0);
    for (int t = 0; t < n; t += 16)
        EACH_SLOT(t) {
            uint8x16_t high = some_counts(p + COUNT_BYTES * t, its), low = some_counts(p + COUNT_BYTES * t + 16, its);
            const int8_t *v = values + from * padded;
#define QUAD(lane) \
    if (t + 4 * lane < n) \
        EACH { \
            int8x16_t bytes = vld1q_s8(v + 4 * lane * padded + 16 * i); \
            h[i] = DOT_BY_UNSIGNED(h[i], bytes, high, lane); \
            l[i] = DOT_BY_UNSIGNED(l[i], bytes, low, lane); \
            if (!UNSIGNED) all[i] = vdotq_s32(all[i], bytes, ones); \
        }
            EACH_LANE(QUAD)
#undef QUAD
        }
    EACH put_gathered(out + 4 * i, raised(h[i], all[i]), raised(l[i], all[i]), worth, size - 4 * i);
}

INLINE void gather(const int parts, const uint8_t *p, const int8_t *values, int padded, const int32_t *table, int64_t stride,
                   int n, float worth, float *out, int size) {
    for (int i = 0; i < parts; i++)
        gather_part(p, values + 64 * i, padded, table, stride, n, worth, out + 16 * i, size - 16 * i);
}

/* ---- language models ---- */

INLINE void tile_bytes(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                       int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    const int8_t *w = (const int8_t *)m->weight + panel * panel_bytes(m);
    const float *scale = (const float *)m->scale + panel * COLUMNS, *bias = m->bias + panel * COLUMNS;
    const char *next = ahead.at;
    int32x4_t s[MOST_ROWS][4];
    EACH_ROW EACH s[r][i] = vdupq_n_s32(0);
    for (int b = 0; b < blocks_of(m->in); b++) {
        next = prefetch(next, ahead.lines);
        for (int k = 0; k < BLOCK / 16; k++, w += 16 * COLUMNS, x += 16) {
            int8x16_t sixteen[MOST_ROWS];
            EACH_ROW sixteen[r] = vld1q_s8((const int8_t *)x + r * stride);
#define QUAD(lane) \
    EACH { \
        int8x16_t fours = vld1q_s8(w + 4 * COLUMNS * lane + 16 * i); \
        EACH_ROW { \
            s[r][i] = vdotq_laneq_s32(s[r][i], fours, sixteen[r], lane); \
            IN_ORDER(s[r][i]); \
        } \
    }
            EACH_LANE(QUAD)
#undef QUAD
        }
    }
    EACH_ROW EACH put_products(out + r * out_stride + 4 * i, s[r][i], scale + 4 * i, bias + 4 * i, steps[r * apart], add);
}

/* Compute 4 columns for each of ``vectors`` vectors from ``part`` on. */
INLINE void some_nibbles(const int rows, const int vectors, int part, const uint8_t *x, int64_t stride, const float *steps,
                         int64_t apart, const Matrix *m, int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    int blocks = blocks_of(m->in), column = 4 * vectors * part;
    int64_t first = (int64_t)panel * blocks * COLUMNS + column;
    const uint8_t *w = (const uint8_t *)m->weight + panel * panel_bytes(m) + 4 * column;
    const uint16_t *scales = (const uint16_t *)m->scale + first, *lows = m->low + first;
    const char *next = ahead.at;
    float32x4_t sum[MOST_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++) sum[r][j] = vdupq_n_f32(0.0f);
    for (int b = 0; b < blocks; b++, w += 16 * COLUMNS, x += BLOCK, scales += COLUMNS, lows += COLUMNS) {
        int32x4_t s[MOST_ROWS][4];
        int8x16_t a[MOST_ROWS], c[MOST_ROWS];
        next = prefetch(next, ahead.lines);
        for (int r = 0; r < rows; r++) {
            a[r] = vld1q_s8((const int8_t *)x + r * stride);
            c[r] = vld1q_s8((const int8_t *)x + r * stride + 16);
            for (int j = 0; j < vectors; j++) s[r][j] = vdupq_n_s32(0);
        }
#define STEP(lane) \
    for (int j = 0; j < vectors; j++) { \
        uint8x16_t two = vld1q_u8(w + 4 * COLUMNS * lane + 16 * j); \
        int8x16_t low = vreinterpretq_s8_u8(vandq_u8(two, vdupq_n_u8(15))), high = vreinterpretq_s8_u8(vshrq_n_u8(two, 4)); \
        for (int r = 0; r < rows; r++) { \
            s[r][j] = vdotq_laneq_s32(s[r][j], low, a[r], lane); \
            s[r][j] = vdotq_laneq_s32(s[r][j], high, c[r], lane); \
        } \
    }
        EACH_LANE(STEP)
#undef STEP
        for (int j = 0; j < vectors; j++) {
            float32x4_t scale = four_bfloat16(scales + 4 * j), minimum = four_bfloat16(lows + 4 * j);
            for (int r = 0; r < rows; r++)
                sum[r][j] = add_block(sum[r][j], s[r][j], scale, minimum, steps[r * apart + b], steps[r * apart + blocks + b]);
        }
    }
    const float *bias = m->bias + panel * COLUMNS + column;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++)
            put(out + r * out_stride + column + 4 * j, vaddq_f32(sum[r][j], vld1q_f32(bias + 4 * j)), add);
}

INLINE void tile_nibbles(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                         int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    const int vectors = rows == 1 ? 4 : rows <= 3 ? 2 : 1;
    for (int part = 0; part < 4 / vectors; part++, ahead.lines = 0)
        some_nibbles(rows, vectors, part, x, stride, steps, apart, m, panel, add, out, out_stride, ahead);
}
