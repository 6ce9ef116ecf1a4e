/* Kernels for x86-64 CPUs with AMX-INT8 and AVX-512 VNNI: products of many rows use AMX.
 *
 * A tile register has 16 rows of 64 bytes. TDPBUSD multiplies 16 rows of 64 unsigned bytes by 64 x 16 signed ones, which lie as
 * a panel of weights does: four inputs of each column side by side. Two tiles of rows by two of columns need as many loads as
 * products.
 *
 * Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", LDTILECFG, TILELOADD, TDPBUSD. */
#define NAME "amx"
#define TABLE kernels_amx

#include "vnni512.h"
#include "products512.h"
#include "rows.h"

#define LEAST_TILE_ROWS 4 /* with fewer, AVX-512 is as fast */
#define STEP 64           /* inputs of a product of tiles */

static _Thread_local int configured;

/* Configuring takes as long as some products, so tiles stay configured until the thread's part of a job ends. */
INLINE void configure(void) {
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } whole = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    if (configured) return;
    _tile_loadconfig(&whole);
    configured = 1;
}

static void release(void) {
    if (configured) _tile_release();
    configured = 0;
}

/* Multiply 32 rows by 32 columns of a panel; ``end`` has the weights after the last whole step, or is NULL. */
INLINE void two_by_two(const uint8_t *x, int64_t wide, const int8_t *w, int steps, const int8_t *end, const int32_t *start,
                       int32_t *sums) {
    _tile_loadd(0, start, 0); /* the same row 16 times */
    _tile_loadd(1, start + 16, 0);
    _tile_loadd(2, start, 0);
    _tile_loadd(3, start + 16, 0);
#define PRODUCTS(weights) \
    _tile_loadd(4, x, wide); \
    _tile_loadd(6, weights, 4 * PANEL); \
    _tile_loadd(7, (weights) + 64, 4 * PANEL); \
    _tile_loadd(5, x + 16 * wide, wide); \
    _tile_dpbusd(0, 4, 6); \
    _tile_dpbusd(1, 4, 7); \
    _tile_dpbusd(2, 5, 6); \
    _tile_dpbusd(3, 5, 7)
    for (int k = 0; k < steps; k++, x += STEP, w += STEP * PANEL) {
        PRODUCTS(w);
    }
    if (end) {
        PRODUCTS(end);
    }
#undef PRODUCTS
    _tile_stored(0, sums, 4 * PANEL);
    _tile_stored(1, sums + 16, 4 * PANEL);
    _tile_stored(2, sums + 16 * PANEL, 4 * PANEL);
    _tile_stored(3, sums + 16 * PANEL + 16, 4 * PANEL);
}

/* Multiply 16 rows by a panel. */
INLINE void one_by_four(const uint8_t *x, int64_t wide, const int8_t *w, int steps, const int8_t *end, const int32_t *start,
                        int32_t *sums) {
    _tile_loadd(0, start, 0);
    _tile_loadd(1, start + 16, 0);
    _tile_loadd(2, start + 32, 0);
    _tile_loadd(3, start + 48, 0);
#define PRODUCTS(weights) \
    _tile_loadd(4, x, wide); \
    _tile_loadd(5, weights, 4 * PANEL); \
    _tile_loadd(6, (weights) + 64, 4 * PANEL); \
    _tile_dpbusd(0, 4, 5); \
    _tile_dpbusd(1, 4, 6); \
    _tile_loadd(5, (weights) + 128, 4 * PANEL); \
    _tile_loadd(6, (weights) + 192, 4 * PANEL); \
    _tile_dpbusd(2, 4, 5); \
    _tile_dpbusd(3, 4, 6)
    for (int k = 0; k < steps; k++, x += STEP, w += STEP * PANEL) {
        PRODUCTS(w);
    }
    if (end) {
        PRODUCTS(end);
    }
#undef PRODUCTS
    _tile_stored(0, sums, 4 * PANEL);
    _tile_stored(1, sums + 16, 4 * PANEL);
    _tile_stored(2, sums + 32, 4 * PANEL);
    _tile_stored(3, sums + 48, 4 * PANEL);
}

/* Compute tile for up to MOST_TILE_ROWS rows. Rows after the last, up to a multiple of 16, are read and multiplied too. */
static void tile_many(Rows from, const Linear *l, Group g, int panel, int add, float *out, int64_t stride) {
    if (l->is_float || g.rows < LEAST_TILE_ROWS) {
        for (int i = 0; i < groups_of(g.rows, MOST_ROWS); i++) {
            Group some = group(g.rows, MOST_ROWS, 1, i);
            tile(from, l, (Group){g.row + some.row, some.rows, g.number, g.of}, panel, add, out + some.row * stride, stride);
        }
        return;
    }
    int64_t wide = filled(l->in), quads = (l->in + 3) / 4, first = panel * PANEL;
    int steps = (int)(quads * 4 / STEP), left = (int)(quads * 4 % STEP);
    const uint8_t *x = from.quantized + g.row * wide;
    const int8_t *w = (const int8_t *)l->weight + first * quads * 4;
    _Alignas(64) int32_t start[PANEL], sums[MOST_TILE_ROWS * PANEL];
    _Alignas(64) int8_t rest[STEP * PANEL], *end = NULL;
    for (int j = 0; j < PANEL; j += 16) i_store(start + j, _mm512_sub_epi32(i_zero(), _mm512_loadu_si512(l->offset + first + j)));
    if (left) {
        memcpy(rest, w + (int64_t)steps * STEP * PANEL, (size_t)left * PANEL);
        memset(rest + left * PANEL, 0, sizeof(rest) - (size_t)left * PANEL);
        end = rest;
    }
    configure();
    if (g.rows > 16) {
        two_by_two(x, wide, w, steps, end, start, sums);
        two_by_two(x, wide, w + 128, steps, end ? end + 128 : NULL, start + 32, sums + 32);
    } else {
        one_by_four(x, wide, w, steps, end, start, sums);
    }
    put_products(g.rows, (Ints(*)[4])sums, l, (int)first, from.step + g.row, add, out, stride);
}

#include "causal512.h"
#include "causal.h"

static void multiply_many(const Given *from, const Matrix *m, int row, int rows, int panel, int add, float *out, int64_t stride,
                          Ahead ahead) {
    for (int i = 0; i < groups_of(rows, MOST_ROWS); i++) {
        Group some = group(rows, MOST_ROWS, 1, i);
        multiply(from, m, row + some.row, some.rows, panel, add, out + some.row * stride, stride, i ? (Ahead){NULL, 0} : ahead);
    }
}

#define TILES .rows = MOST_TILE_ROWS, .unit = TILE_UNIT, .release = release, .tile = tile_many, .multiply = multiply_many
#include "table.h"
