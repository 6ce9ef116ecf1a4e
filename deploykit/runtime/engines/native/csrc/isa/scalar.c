/* Kernels in plain C: the slow reference, which other instruction sets must match bit for bit. */
#include <math.h>
#include <string.h>

#include "../kernels.h"

#define NAME "scalar"
#define TABLE kernels_scalar
#define ZERO 0

typedef struct { float v[16]; } Floats;
typedef struct { int32_t v[16]; } Ints;

#define EACH for (int i = 0; i < 16; i++)
#define FLOATS(expression) Floats r; EACH r.v[i] = (expression); return r
#define INTS(expression) Ints r; EACH r.v[i] = (expression); return r

INLINE Floats f_set(float x) { FLOATS(x); }
INLINE Floats f_zero(void) { return f_set(0.0f); }
INLINE Floats f_load(const float *x) { FLOATS(x[i]); }
INLINE Floats f_load_or(const float *x, int left, float other) { FLOATS(i < left ? x[i] : other); }
INLINE Floats f_load_some(const float *x, int left) { return f_load_or(x, left, 0.0f); }
INLINE void f_store(float *to, Floats x) { EACH to[i] = x.v[i]; }
INLINE void f_store_some(float *to, Floats x, int left) {
    for (int i = 0; i < 16 && i < left; i++) to[i] = x.v[i];
}
INLINE Floats f_first(Floats x, int left) { FLOATS(i < left ? x.v[i] : 0.0f); }
INLINE Floats f_select(uint32_t mask, Floats a, Floats b) { FLOATS(mask >> i & 1 ? b.v[i] : a.v[i]); }
INLINE Floats f_where_positive(Floats x, Floats y) { FLOATS(x.v[i] > 0.0f ? y.v[i] : 0.0f); }
INLINE Floats f_add(Floats a, Floats b) { FLOATS(a.v[i] + b.v[i]); }
INLINE Floats f_sub(Floats a, Floats b) { FLOATS(a.v[i] - b.v[i]); }
INLINE Floats f_mul(Floats a, Floats b) { FLOATS(a.v[i] * b.v[i]); }
INLINE Floats f_div(Floats a, Floats b) { FLOATS(a.v[i] / b.v[i]); }
INLINE Floats f_fma(Floats a, Floats b, Floats c) { FLOATS(fmaf(a.v[i], b.v[i], c.v[i])); }
INLINE Floats f_fms(Floats a, Floats b, Floats c) { FLOATS(fmaf(a.v[i], b.v[i], -c.v[i])); }
INLINE Floats f_max(Floats a, Floats b) { FLOATS(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
INLINE Floats f_min(Floats a, Floats b) { FLOATS(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
INLINE Floats f_abs(Floats x) { FLOATS(fabsf(x.v[i])); }
INLINE Floats f_fraction(Floats x) { FLOATS(isinf(x.v[i]) ? 0.0f : x.v[i] - floorf(x.v[i])); }
/* x 2^floor(y) */
INLINE Floats f_scale(Floats x, Floats y) { FLOATS(ldexpf(x.v[i], (int)floorf(fmaxf(fminf(y.v[i], 300.0f), -300.0f)))); }
INLINE uint32_t f_greater(Floats a, float b) {
    uint32_t mask = 0;
    EACH mask |= (uint32_t)(a.v[i] > b) << i;
    return mask;
}
INLINE float f_highest(Floats x) {
    float highest = x.v[0];
    EACH highest = highest > x.v[i] ? highest : x.v[i];
    return highest;
}
INLINE float f_sum(Floats x) { /* add the upper half to the lower, and repeat: the order of all sums over lanes */
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) x.v[i] += x.v[i + width];
    return x.v[0];
}
/* The Hadamard transform of 16 values. */
INLINE Floats f_transform(Floats x) {
    for (int apart = 1; apart < 16; apart *= 2) {
        Floats y = x;
        EACH x.v[i] = i & apart ? y.v[i ^ apart] - y.v[i] : y.v[i] + y.v[i ^ apart];
    }
    return x;
}
INLINE void f_transpose(Floats x[16]) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            float y = x[i].v[j];
            x[i].v[j] = x[j].v[i];
            x[j].v[i] = y;
        }
}

INLINE Ints f_bits(Floats x) {
    Ints r;
    memcpy(&r, &x, sizeof(r));
    return r;
}
INLINE Floats f_lookup(const float *table, Ints at) { FLOATS(table[at.v[i] & 15]); }
INLINE Floats f_from(Ints x) { FLOATS((float)x.v[i]); }
INLINE Ints i_set(int32_t x) { INTS(x); }
INLINE Ints i_zero(void) { return i_set(0); }
INLINE Ints i_round(Floats x) { INTS((int32_t)rintf(x.v[i])); }
INLINE Ints i_add(Ints a, Ints b) { INTS(a.v[i] + b.v[i]); }
INLINE int32_t i_sum(Ints x) {
    int32_t sum = 0;
    EACH sum += x.v[i];
    return sum;
}
INLINE Ints i_pair(Ints a, Ints b) { INTS((int32_t)((uint32_t)(a.v[i] & 0xffff) | (uint32_t)b.v[i] << 16)); }
INLINE uint32_t i_equal(const int32_t *x, int32_t y) {
    uint32_t mask = 0;
    EACH mask |= (uint32_t)(x[i] == y) << i;
    return mask;
}
INLINE Ints i_load_bytes(const int8_t *x, int left) { INTS(i < left ? x[i] : 0); }
INLINE void i_store(void *to, Ints x) { memcpy(to, &x, sizeof(x)); }
INLINE void i_put_bytes(void *to, Ints x) { EACH ((int8_t *)to)[i] = (int8_t)x.v[i]; }
INLINE void i_put_shorts(void *to, Ints x) { EACH ((int16_t *)to)[i] = (int16_t)x.v[i]; }
INLINE void i_put_every_fourth_byte(int8_t *to, Ints x, int place) { EACH to[4 * i + place] = (int8_t)x.v[i]; }

#include "slots.h"

/* ---- linear layers ---- */

INLINE void tile_int8(const int rows, const uint8_t *x, int64_t wide, const float *step, const Linear *l, int first, int add,
                      float *out, int64_t stride, const int8_t *ahead, int apart) {
    int quads = (l->in + 3) / 4;
    const int8_t *w = (const int8_t *)l->weight + (int64_t)first * quads * 4;
    (void)ahead, (void)apart;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < PANEL; j++) {
            int32_t sum = 0;
            for (int k = 0; k < 4 * quads; k++) sum += (int8_t)x[r * wide + k] * w[(k / 4 * PANEL + j) * 4 + k % 4];
            float v = fmaf((float)sum, l->scale[first + j] * step[r], l->bias[first + j]), *to = out + r * stride + j;
            *to = add ? v + *to : v;
        }
}

INLINE void tile_float(const int rows, const float *x, int64_t wide, const Linear *l, int first, int add, float *out,
                       int64_t stride) {
    const float *w = (const float *)l->weight + (int64_t)first * l->in;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < PANEL; j++) {
            float sum = 0.0f, *to = out + r * stride + j;
            for (int k = 0; k < l->in; k++) sum = fmaf(x[r * wide + k], w[k * PANEL + j], sum);
            sum += l->bias[first + j];
            *to = add ? sum + *to : sum;
        }
}

/* ---- a decoder's attention ---- */

typedef struct { int16_t v[256]; } Query;

INLINE void put_query(Query *q, int i, Ints v) { i_put_shorts(q->v + i, v); }

/* Set ``product[g]`` to a query's products with 16 keys, too high by 128 x the query's sum. */
INLINE void key_products(const int heads, const Query *q, const int8_t *keys, int64_t keys_apart, int padded,
                         const int8_t *values, int64_t values_apart, Floats *product) {
    (void)values, (void)values_apart;
    for (int g = 0; g < heads; g++)
        for (int j = 0; j < 16; j++) {
            int32_t sum = 0;
            for (int i = 0; i < padded; i++)
                sum += q[g].v[i] * (uint8_t)keys[g * keys_apart + i / 4 * 64 + 4 * j + i % 4];
            product[g].v[j] = (float)sum;
        }
}

#define COUNT_BYTES 2

INLINE void put_counts(uint8_t *p, Ints counts) { i_put_shorts(p, counts); }

/* Multiply values by counts, for ``parts`` parts of 16 values of a head. High and low bytes of counts are summed separately,
 * because in float32 sums over many positions would round differently. */
INLINE void gather(const int parts, const uint8_t *p, const int8_t *values, int padded, const int32_t *table, int64_t stride,
                   int n, float worth, float *out, int size) {
    int32_t h[64] = {0}, l[64] = {0};
    for (int t = 0; t < n; t++) {
        int64_t from = t / 16 * 16 + (table ? table[t] * stride : 0) + t % 16 / 4 * 4;
        uint16_t count;
        memcpy(&count, p + 2 * t, 2);
        for (int i = 0; i < 16 * parts; i++) {
            int8_t value = values[from * padded + 4 * i + t % 4];
            h[i] += value * (count >> 8);
            l[i] += value * (count & 255);
        }
    }
    for (int i = 0; i < 16 * parts && i < size; i++) out[i] = fmaf((float)h[i], 256.0f, (float)l[i]) * worth;
}

/* ---- a classifier's attention ---- */

/* Set ``sum`` to shares times values, for 32 values of a head. */
INLINE void value_sums(int rows, const int16_t *shares, int64_t keys, const int32_t *v, int padded, int64_t pairs,
                       Ints sum[MOST_ROWS][2]) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 32; i++) {
            int32_t total = 0;
            for (int j = 0; j < 2 * pairs; j++) {
                int16_t two[2];
                memcpy(two, v + j / 2 * padded + i, 4);
                total += shares[r * keys + j] * two[j % 2];
            }
            sum[r][i / 16].v[i % 16] = total;
        }
}

#include "causal_scalar.h"
#include "table.h"
