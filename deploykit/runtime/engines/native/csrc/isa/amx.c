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

#define STEP 64        /* inputs of a product of tiles */
#define MOST_STEPS 512 /* of a language model's matrix: 512 KB on the stack */

/* Positions of 16-bit values: those of the first and of the second half by turns. */
static const int16_t BY_TURNS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

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

/* A panel's weights: ``steps`` whole steps, then ``end``, a step padded with zeros, if that is not NULL. ``start``, [64], are
 * the sums to begin with; NULL: zeros. */
typedef struct {
    const int8_t *weights, *end;
    const int32_t *start;
    int steps;
} Panel;

#define EACH_STEP(column, PRODUCTS) \
    const int8_t *w = p->weights + 4 * (column); \
    for (int k = 0; k < p->steps; k++, x += STEP, w += STEP * PANEL) { \
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
    Panel p = {w, left ? end : NULL, start, steps};
    for (int j = 0; j < PANEL && !l->is_float; j += 16)
        i_store(start + j, _mm512_sub_epi32(i_zero(), _mm512_loadu_si512(l->offset + first + j)));
    if (left && !l->is_float) {
        memcpy(end, w + (int64_t)steps * STEP * PANEL, (size_t)left * PANEL);
        memset(end + left * PANEL, 0, sizeof(end) - (size_t)left * PANEL);
    }
    for (int row = 0, rows; row < g.rows; row += rows) {
        const uint8_t *x = from.quantized + (g.row + row) * wide;
        const float *step = from.step + g.row + row;
        rows = rows_of_block(g.rows - row, l->is_float);
        if (rows <= MOST_ROWS) {
            tile(from, l, (Group){g.row + row, rows, g.number, g.of}, panel, then_at(then, row * stride), stride);
            continue;
        }
        int columns = rows > 16 ? 32 : 64;
        configure();
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

/* Tiles have bytes, so the 16 bits of an INT8 matrix's activations are split: a row has its signed high bytes after half of its
 * room, and its unsigned low bytes after three quarters. */
static void give_bytes(const Given *to, const Matrix *next, int row, const float *x) {
    give(to, next, row, x);
    if (next->kind != INT8) return;
    uint8_t *y = to->rows + row * to->stride;
    for (int i = 0; i < wide(next->in); i += BLOCK) {
        Ints shorts = _mm512_loadu_si512(y + 2 * i);
        _mm256_storeu_si256((__m256i *)(y + to->stride / 2 + i), _mm512_cvtepi16_epi8(_mm512_srai_epi16(shorts, 8)));
        _mm256_storeu_si256((__m256i *)(y + to->stride / 4 * 3 + i), _mm512_cvtepi16_epi8(shorts));
    }
}

/* Multiply 16 rows, or 32 if ``both``, by 16 columns. */
INLINE void shorts_by_bytes(const int both, const uint8_t *high, const uint8_t *low, int64_t stride, const int8_t *w, int steps,
                            int32_t *sums) {
    clear_sums();
    for (int k = 0; k < steps; k++, high += STEP, low += STEP, w += STEP * COLUMNS) {
        _tile_loadd(4, high, stride);
        _tile_loadd(6, w, STEP);
        _tile_loadd(5, low, stride);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbusd(1, 5, 6);
        if (!both) continue;
        _tile_loadd(4, high + 16 * stride, stride);
        _tile_loadd(5, low + 16 * stride, stride);
        _tile_dpbssd(2, 4, 6);
        _tile_dpbusd(3, 5, 6);
    }
    _tile_stored(0, sums, STEP);
    _tile_stored(1, sums + 256, STEP);
    if (!both) return;
    _tile_stored(2, sums + 512, STEP);
    _tile_stored(3, sums + 768, STEP);
}

/* Compute multiply for up to MATRIX_ROWS rows. The weights, two inputs of each column side by side, are laid out for tiles,
 * four inputs side by side, once for all rows. */
static void multiply_many(const Given *from, const Matrix *m, int row, int rows, int panel, int add, float *out, int64_t stride,
                          Ahead ahead) {
    int blocks = blocks_of(m->in), steps = (blocks + 1) / 2;
    if (m->kind != INT8 || rows <= MOST_ROWS || steps > MOST_STEPS) {
        for (int i = 0; i < groups_of(rows, MOST_ROWS); i++) {
            Group some = group(rows, MOST_ROWS, 1, i);
            multiply(from, m, row + some.row, some.rows, panel, add, out + some.row * stride, stride, i ? (Ahead){NULL, 0} : ahead);
        }
        return;
    }
    _Alignas(64) int8_t laid[MOST_STEPS * STEP * COLUMNS];
    _Alignas(64) int32_t sums[4 * 256];
    const int8_t *w = (const int8_t *)m->weight + panel * panel_bytes(m);
    int quads = blocks * BLOCK / 4;
    Ints turned = _mm512_loadu_si512(BY_TURNS);
    for (int k = 0; k < quads; k++)
        _mm512_store_si512(laid + 64 * k, _mm512_permutexvar_epi16(turned, _mm512_load_si512(w + 64 * k)));
    for (int k = quads; k < steps * STEP / 4; k++) _mm512_store_si512(laid + 64 * k, i_zero());
    Floats scale = f_load((const float *)m->scale + panel * COLUMNS), bias = f_load(m->bias + panel * COLUMNS);
    configure();
    for (int first = 0; first < rows; first += 32) {
        const uint8_t *x = from->rows + (row + first) * from->stride, *high = x + from->stride / 2, *low = x + from->stride / 4 * 3;
        const float *step = from->steps + (row + first) * from->apart;
        int some = rows - first < 32 ? rows - first : 32;
        if (some > 16) shorts_by_bytes(1, high, low, from->stride, laid, steps, sums);
        else shorts_by_bytes(0, high, low, from->stride, laid, steps, sums);
        for (int r = 0; r < some; r++) {
            const int32_t *at = sums + r / 16 * 512 + r % 16 * 16;
            Ints sum = i_add(_mm512_slli_epi32(_mm512_load_si512(at), 8), _mm512_load_si512(at + 256));
            put(out + (first + r) * stride, f_fma(f_from(sum), f_mul(scale, f_set(step[r * from->apart])), bias), add);
        }
    }
}

#define TILES \
    .rows = MOST_TILE_ROWS, .matrix_rows = MATRIX_ROWS, .unit = TILE_UNIT, .release = release, .tile = tile_many, \
    .queries = TEXT_QUERIES, .take_head = take_text_head, .attend_head = attend_text_head, .give = give_bytes, \
    .multiply = multiply_many
#include "table.h"
