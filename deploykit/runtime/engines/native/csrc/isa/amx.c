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

#define STEP 64     /* inputs of a product of tiles */
#define TILE 1024   /* bytes */
#define AHEAD 24576 /* bytes from weights to those that are prefetched */

static _Thread_local int configured;

/* Configuring takes as long as some products, so tiles stay configured until the thread's part of a job ends. ``rows``: of
 * sums and of activations. */
INLINE void configure(int rows) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } whole = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {rows, rows, rows, rows, rows, rows, 16, 16}};
    if (configured == rows) return;
    _tile_loadconfig(&whole);
    configured = rows;
}

static void release(void) {
    if (configured) _tile_release();
    configured = 0;
}

/* Finish all stores before tiles are loaded: GCC does not know that _tile_loadd reads memory. */
INLINE void settle(void) { __asm__ volatile("" ::: "memory"); }

/* A panel's weights: ``steps`` whole steps, then ``end``, a step padded with zeros, if that is not NULL. ``start``, [64], are
 * the sums to begin with; NULL: zeros. Each step prefetches ``lines`` cache lines of weights to come: all 64 of a step for 64
 * columns, half of them for 32. */
typedef struct {
    const int8_t *weights, *end;
    const int32_t *start;
    int steps, lines;
} Panel;

#define EACH_STEP(column, PRODUCTS) \
    const int8_t *w = p->weights + 4 * (column); \
    for (int k = 0; k < p->steps; k++, x += STEP, w += STEP * PANEL) { \
        for (int i = 0; i < p->lines; i++) _mm_prefetch(w + 60 * (column) + AHEAD + 64 * i, _MM_HINT_T1); \
        PRODUCTS; \
    } \
    if (p->end) { \
        w = p->end + 4 * (column); \
        PRODUCTS; \
    }

INLINE void clear_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Multiply 32 rows of ``x`` by the 32 columns from ``column`` on. */
INLINE void two_by_two(const uint8_t *x, int64_t wide, const Panel *p, int column, int32_t *sums) {
    const int32_t *start = p->start + column;
    _tile_loadd(0, start, 0); /* the same row 16 times */
    _tile_loadd(1, start + 16, 0);
    _tile_loadd(2, start, 0);
    _tile_loadd(3, start + 16, 0);
    EACH_STEP(column, {
        _tile_loadd(4, x, wide);
        _tile_loadd(6, w, 4 * PANEL);
        _tile_loadd(7, w + 64, 4 * PANEL);
        _tile_loadd(5, x + 16 * wide, wide);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    });
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
}

/* Multiply 16 rows, signed or not, by a panel. Rows of ``sums`` are ``stride`` bytes apart. */
INLINE void one_by_four(const int is_signed, const uint8_t *x, int64_t wide, const Panel *p, int32_t *sums, int64_t stride) {
#define PRODUCT(to, weights) \
    if (is_signed) _tile_dpbssd(to, 4, weights); \
    else _tile_dpbusd(to, 4, weights)
    if (p->start) {
        _tile_loadd(0, p->start, 0);
        _tile_loadd(1, p->start + 16, 0);
        _tile_loadd(2, p->start + 32, 0);
        _tile_loadd(3, p->start + 48, 0);
    } else clear_sums();
    EACH_STEP(0, {
        _tile_loadd(4, x, wide);
        _tile_loadd(5, w, 4 * PANEL);
        _tile_loadd(6, w + 64, 4 * PANEL);
        PRODUCT(0, 5);
        PRODUCT(1, 6);
        _tile_loadd(5, w + 128, 4 * PANEL);
        _tile_loadd(6, w + 192, 4 * PANEL);
        PRODUCT(2, 5);
        PRODUCT(3, 6);
    });
#undef PRODUCT
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + 16, stride);
    _tile_stored(2, sums + 32, stride);
    _tile_stored(3, sums + 48, stride);
}

/* Write ``rows`` rows of ``sums``, [rows][columns], as float32. */
INLINE void write_as(const int activation, const int32_t *sums, int rows, int columns, const float *scale, const float *bias,
                     const float *step, Then then, int64_t stride) {
    for (int j = 0; j < columns; j += 16) {
        Floats scales = f_load(scale + j), biases = f_load(bias + j);
        for (int r = 0; r < rows; r++) {
            int64_t at = r * stride + j;
            Floats v = f_fma(f_from(_mm512_load_si512(sums + r * columns + j)), f_mul(scales, f_set(step[r])), biases);
            if (then.add) v = f_add(v, f_load(then.out + at));
            v = activated(activation, v);
            if (then.factor) v = f_mul(v, f_load(then.factor + at));
            f_store(then.out + at, v);
        }
    }
}

/* Of ``left`` rows, those that are computed together: up to MOST_ROWS by AVX-512, which is faster for so few, or 16 or 32 by
 * AMX, of which some may be missing. */
INLINE int rows_of_block(int left, int is_float) {
    if (left <= MOST_ROWS || is_float) return left < MOST_ROWS ? left : MOST_ROWS;
    if (left <= 16 + MOST_ROWS) return left < 16 ? left : 16;
    return left < 32 ? left : 32;
}

/* Compute tile for up to MOST_TILE_ROWS rows. Rows after the last, up to a multiple of 16, are read and multiplied too. */
static void tile_many(Rows from, const Linear *l, Group g, int panel, Then then, int64_t stride) {
    if (g.rows <= MOST_ROWS) { /* nothing to prepare */
        tile(from, l, g, panel, then, stride);
        return;
    }
    int64_t wide = filled(l->in), quads = (l->in + 3) / 4;
    int steps = (int)(quads * 4 / STEP), left = (int)(quads * 4 % STEP), first = panel * PANEL;
    const int8_t *w = (const int8_t *)l->weight + first * quads * 4;
    _Alignas(64) int32_t start[PANEL], sums[32 * 32];
    _Alignas(64) int8_t end[STEP * PANEL];
    Panel p = {w, left ? end : NULL, start, steps, 0};
    for (int j = 0; j < PANEL && !l->is_float; j += 16)
        i_store(start + j, _mm512_sub_epi32(i_zero(), _mm512_loadu_si512(l->offset + first + j)));
    if (left && !l->is_float) {
        memcpy(end, w + (int64_t)steps * STEP * PANEL, (size_t)left * PANEL);
        memset(end + left * PANEL, 0, sizeof(end) - (size_t)left * PANEL);
    }
    settle();
    for (int row = 0, rows; row < g.rows; row += rows) {
        const uint8_t *x = from.quantized + (g.row + row) * wide;
        const float *step = from.step + g.row + row;
        rows = rows_of_block(g.rows - row, l->is_float);
        if (rows <= MOST_ROWS) {
            tile(from, l, (Group){g.row + row, rows, g.number, g.of}, panel, then_at(then, row * stride), stride);
            continue;
        }
        int columns = rows > 16 ? 32 : 64;
        p.lines = row ? 0 : columns;
        configure(16);
        for (int column = 0; column < PANEL; column += columns) {
            const float *scale = l->scale + first + column, *bias = l->bias + first + column;
            Then to = then_at(then, row * stride + column);
            if (columns == 64) one_by_four(0, x, wide, &p, sums, 4 * PANEL);
            else two_by_two(x, wide, &p, column, sums);
            switch (then.activation) {
#define CASE(kind) case kind: write_as(kind, sums, rows, columns, scale, bias, step, to, stride); break
            CASE(RELU);
            CASE(SILU);
            CASE(GELU);
            CASE(GELU_TANH);
            CASE(TANH);
            default: write_as(NONE, sums, rows, columns, scale, bias, step, to, stride);
#undef CASE
            }
        }
    }
}

#include "text_attention_amx.h"
#include "causal512.h"
#include "causal.h"

INLINE int tile_steps(const Matrix *m) { return (m->in + STEP - 1) / STEP; }

/* Also write the row for tiles, signed. */
static void give_bytes(const Given *to, const Matrix *next, int row, const float *x) {
    give(to, next, row, x);
    if (next->kind != INT8) return;
    const __m256i zero = _mm256_set1_epi8((char)ZERO);
    const uint8_t *bytes = to->rows + row * to->stride;
    uint8_t *tiles = to->tiles + row / 16 * tile_steps(next) * TILE + row % 16 * STEP;
    for (int i = 0; i < wide(next->in); i += BLOCK) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(bytes + i));
        _mm256_storeu_si256((__m256i *)(tiles + i / STEP * TILE + i % STEP), _mm256_sub_epi8(v, zero));
    }
}

/* Multiply 16 rows by a panel, or by two, ``apart`` bytes apart. Even and odd steps have their own sums, to hide latency. ``end``, if
 * not NULL: a last step. With each step of a panel, prefetches ``lines`` cache lines from ``ahead`` on, into the second cache:
 * in the first one, activations would have to wait. */
INLINE void rows_by_panels(const int both, const uint8_t *x, const int8_t *w, int64_t apart, int steps, const int8_t *end,
                           const int8_t *ahead, int lines, int32_t *sums) {
    clear_sums();
#define STEP_OF(first, second, weights, between) \
    _tile_loadd(4, x, STEP); \
    _tile_loadd(6, weights, STEP); \
    _tile_dpbssd(first, 4, 6); \
    if (both) { \
        _tile_loadd(7, weights + between, STEP); \
        _tile_dpbssd(second, 4, 7); \
    } \
    x += TILE
#define PREFETCH \
    for (int i = 0; i < lines; i++) _mm_prefetch(ahead + 64 * i, _MM_HINT_T1); \
    for (int i = 0; both && i < lines; i++) _mm_prefetch(ahead + apart + 64 * i, _MM_HINT_T1); \
    w += TILE, ahead += TILE
    for (int k = 0; k < steps; k += 2) {
        STEP_OF(0, 2, w, apart);
        PREFETCH;
        if (k + 1 == steps) break;
        STEP_OF(1, 3, w, apart);
        PREFETCH;
    }
    if (end) {
        STEP_OF(1, 3, end, TILE);
    }
#undef PREFETCH
#undef STEP_OF
    _tile_stored(0, sums, STEP);
    _tile_stored(1, sums + 256, STEP);
    if (!both) return;
    _tile_stored(2, sums + 512, STEP);
    _tile_stored(3, sums + 768, STEP);
}

/* Write up to 16 rows of a panel's products as float32. */
INLINE void put_sums(const Given *from, const Matrix *m, int row, int rows, int panel, const int32_t *sums, int add, float *out,
                     int64_t stride) {
    Floats scale = f_load((const float *)m->scale + panel * COLUMNS), bias = f_load(m->bias + panel * COLUMNS);
    const float *step = from->steps + row * from->apart;
    for (int r = 0; r < rows && r < 16; r++, sums += 16) {
        Ints sum = i_add(_mm512_load_si512(sums), _mm512_load_si512(sums + 256));
        put(out + r * stride, f_fma(f_from(sum), f_mul(scale, f_set(step[r * from->apart])), bias), add);
    }
}

/* Compute multiply for up to MATRIX_ROWS rows. */
static void multiply_many(const Given *from, const Matrix *m, int row, int rows, int panel, int panels, int add, float *out,
                          int64_t stride, Ahead ahead) {
    if (m->kind != INT8) {
        for (int i = 0; i < groups_of(rows, MOST_ROWS); i++) {
            Group some = group(rows, MOST_ROWS, 1, i);
            multiply(from, m, row + some.row, some.rows, panel, panels, add, out + some.row * stride, stride,
                     i ? (Ahead){NULL, 0} : ahead);
        }
        return;
    }
    _Alignas(64) int32_t sums[4 * 256];
    _Alignas(64) int8_t end[2 * TILE];
    int64_t bytes = panel_bytes(m);
    const int8_t *w = (const int8_t *)m->weight + panel * bytes;
    int all = tile_steps(m), steps = blocks_of(m->in) * BLOCK / STEP, blocks = groups_of(rows, 16);
    int lines = groups_of(TILE / 64, blocks); /* each block of rows prefetches its share */
    for (int i = 0; i < panels && steps < all; i++) {
        memcpy(end + i * TILE, w + i * bytes + steps * TILE, TILE / 2);
        memset(end + i * TILE + TILE / 2, 0, TILE / 2);
    }
    settle();
    configure(blocks == 1 ? rows : 16); /* computing missing rows would take time too */
    for (int i = 0; i < blocks; i++) {
        const uint8_t *x = from->tiles + (row / 16 + i) * all * TILE;
        const int8_t *later = w + AHEAD + 64 * lines * i, *last = steps < all ? end : NULL;
        if (panels == 2) rows_by_panels(1, x, w, bytes, steps, last, later, lines, sums);
        else rows_by_panels(0, x, w, bytes, steps, last, later, lines, sums);
        for (int j = 0; j < panels; j++)
            put_sums(from, m, row + 16 * i, rows - 16 * i, panel + j, sums + 512 * j, add, out + 16 * i * stride + j * COLUMNS, stride);
    }
}

#define TILES \
    .rows = MOST_TILE_ROWS, .matrix_rows = MATRIX_ROWS, .unit = TILE_UNIT, .panels = MOST_PANELS, .release = release, .tile = tile_many, \
    .queries = TEXT_QUERIES, .take_head = take_text_head, .attend_head = attend_text_head, .give = give_bytes, \
    .multiply = multiply_many
#include "table.h"
