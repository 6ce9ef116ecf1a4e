/* Decoder-only language models: one step over any tokens of any rows.
 *
 * A token's result depends only on its own row's caches: neither on the other tokens of the step, nor on the
 * number of threads, to the bit. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define LOCAL_BYTES 32768 /* of weights, which all groups of rows use while they are in a cache */

typedef struct Causal {
    const CausalModel *model;
    const CausalBatch *batch;
    int capacity, room;            /* rows, and positions of scores */
    char *memory;                  /* of the following, for all rows of the batch */
    float *x, *packed, *attended;
    float *middle;                 /* over ``packed`` and ``attended``, which attention alone needs */
    float *y;                      /* NULL if blocks add their output to ``x`` at once */
    Given given;
    Given *own;                    /* [threads]: one for each thread, for the single row of a batch */
    float **normed, **scores;      /* [threads] */
} Causal;

INLINE int inner_of(const CausalModel *m) { return wide(m->inner); }

static int widest_of(const CausalModel *m) {
    int widest = wide(m->hidden), width = wide(m->heads * m->head_size), inner = inner_of(m);
    if (width > widest) widest = width;
    return inner > widest ? inner : widest;
}

/* Take ``bytes`` of ``memory`` after those that are used. Returns NULL if there is none, to compute how much is needed. */
static void *take(char *memory, int64_t *used, int64_t bytes) {
    void *taken = memory ? memory + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return taken;
}

static void lay_given(Given *g, char *memory, int64_t *used, int rows, int widest) {
    g->stride = (int64_t)widest * sizeof(float);
    g->apart = 2 * blocks_of(widest);
    g->rows = take(memory, used, rows * g->stride);
    g->steps = take(memory, used, rows * g->apart * (int64_t)sizeof(float));
    g->tiles = take(memory, used, (rows + TILE_UNIT) * (int64_t)(widest + TILE_BYTES));
}

/* Allocate memory for one row, which begins at ``g->rows``. */
static int new_given(Given *g, int widest) {
    int64_t bytes = 0, used = 0;
    lay_given(g, NULL, &bytes, 1, widest);
    lay_given(g, room(NULL, bytes), &used, 1, widest);
    return g->rows != NULL;
}

/* Read a column of a matrix: a token's embedding. */
static void look_up(const Context *c, int64_t token, int position, float *x) {
    const CausalModel *model = c->causal->model;
    const Matrix *m = &model->embedding;
    int64_t panel = token / COLUMNS;
    int lane = (int)(token % COLUMNS), n = wide(m->in);
    const char *weight = (const char *)m->weight + panel * panel_bytes(m);
    const float *positions = model->positions ? model->positions + (int64_t)position * model->hidden : NULL;
    if (m->kind == FLOAT32) {
        for (int i = 0; i < n; i++) x[i] = ((const float *)weight)[i * COLUMNS + lane] * model->embedding_scale;
    } else {
        float scale = ((const float *)m->scale)[token] * model->embedding_scale;
        for (int i = 0; i < n; i++) x[i] = (float)((const int8_t *)weight)[(i / 4 * COLUMNS + lane) * 4 + i % 4] * scale;
        c->kernels->transform_back(m, x);
    }
    for (int i = 0; positions && i < model->hidden; i++) x[i] += positions[i];
}

/* The weights to prefetch while ``group`` is multiplied by a panel: its share of the panel ``local`` panels later. */
static Ahead ahead_of(const Matrix *m, int panel, int local, int group, int groups) {
    int64_t bytes = panel_bytes(m), lines = bytes / blocks_of(m->in) / 64;
    if (group >= lines) return (Ahead){NULL, 0};
    const char *later = (const char *)m->weight + (panel + local) * bytes;
    return (Ahead){later + bytes * group / groups, (int)((lines + groups - 1) / groups)};
}

INLINE int local_panels(const Matrix *m) { return panel_bytes(m) < LOCAL_BYTES ? (int)(LOCAL_BYTES / panel_bytes(m)) : 1; }

/* Multiply all rows by some of the panels. */
static void product(Context *c, int number, const Given *from, const Matrix *m, int rows, int add, float *out, int64_t stride) {
    int first, last, end, groups = groups_of(rows, c->kernels->matrix_rows), local = local_panels(m), whole = (int)(stride / COLUMNS);
    share(panels_of(m->out), c->threads, number, &first, &last);
    local = groups_of(local, c->kernels->panels) * c->kernels->panels;
    for (int begin = first; begin < last; begin = end) {
        end = begin + local < last ? begin + local : last;
        for (int g = 0; g < groups; g++) {
            Group some = group(rows, c->kernels->matrix_rows, c->kernels->unit, g);
            for (int panel = begin, panels; panel < end; panel += panels) {
                Ahead ahead = ahead_of(m, panel, local, g, groups);
                float rest[MATRIX_ROWS * COLUMNS], *to = out + some.row * stride + panel * COLUMNS;
                int left = (panel < whole && end > whole ? whole : end) - panel;
                panels = left < c->kernels->panels ? left : c->kernels->panels;
                if (panel < whole) {
                    c->kernels->multiply(from, m, some.row, some.rows, panel, panels, add, to, stride, ahead);
                    continue;
                }
                c->kernels->multiply(from, m, some.row, some.rows, panel, 1, 0, rest, COLUMNS, ahead); /* the vocabulary's end */
                for (int r = 0; r < some.rows; r++)
                    memcpy(to + r * stride, rest + r * COLUMNS, sizeof(float) * (size_t)(stride - panel * COLUMNS));
            }
        }
    }
}

/* Multiply by up (and gate), and apply the activation. */
static void widen(Context *c, int number, const Given *from, const CausalLayer *layer, int rows, float *out, int64_t stride) {
    const Matrix *m = &layer->up;
    int first, last, each = layer->gated ? 2 : 1, groups = groups_of(rows, c->kernels->matrix_rows), local = (local_panels(m) + each - 1) / each;
    share(panels_of(m->out) / each, c->threads, number, &first, &last);
    for (int begin = first; begin < last; begin += local)
        for (int g = 0; g < groups; g++) {
            Group some = group(rows, c->kernels->matrix_rows, c->kernels->unit, g);
            for (int panel = begin; panel < begin + local && panel < last; panel++) {
                float wide[MATRIX_ROWS * 2 * COLUMNS], *to = out + some.row * stride + panel * COLUMNS;
                int panels = c->kernels->panels < each ? 1 : each, apart = each * COLUMNS;
                for (int i = 0; i < each; i += panels) {
                    Ahead ahead = ahead_of(m, panel * each + i, local * each, g, groups);
                    c->kernels->multiply(from, m, some.row, some.rows, panel * each + i, panels, 0, wide + i * COLUMNS, apart, ahead);
                }
                c->kernels->pass_gate(layer->activation, layer->gated, wide, apart, some.rows, to, stride);
            }
        }
}

/* Normalize all rows of ``x`` (of ``places``, if given) and prepare them as the input of ``next``. Each thread prepares
 * a single row for itself, which is faster than waiting for another thread. */
static const Given *prepare(Context *c, int number, const float *x, int64_t stride, const int32_t *places, int rows,
                            const Norm *norm, const Matrix *next) {
    Causal *l = c->causal;
    int first = 0, last = rows;
    const Given *to = rows == 1 ? &l->own[number] : &l->given;
    if (rows > 1) share(rows, c->threads, number, &first, &last);
    for (int row = first; row < last; row++) {
        const float *from = x + (places ? places[row] : row) * stride;
        if (norm) c->kernels->normalize(norm, from, l->normed[number], next->in);
        c->kernels->give(to, next, row, norm ? l->normed[number] : from);
    }
    if (rows > 1) barrier(c);
    return to;
}

/* Normalize and rotate a head's query or key: [size] padded to 16. */
static void turn(Context *c, const CausalLayer *layer, const Norm *norm, const float *angles, int size, const float *x,
                 float *to) {
    int half = layer->turned;
    memcpy(to, x, sizeof(float) * (size_t)size);
    memset(to + size, 0, sizeof(float) * (size_t)(padded_head(size) - size));
    if (norm->gamma) c->kernels->normalize(norm, to, to, size);
    if (!angles) return;
    for (int i = 0; i < half; i++) {
        float a = to[i], b = to[half + i], cosine = angles[i], sine = angles[half + i];
        to[i] = a * cosine - b * sine;
        to[half + i] = b * cosine + a * sine;
    }
}

/* The caches of a head of a layer, in the slot of ``row``. */
typedef struct {
    uint8_t *keys, *values;
} Region;

INLINE Region region_of(const Causal *l, int row, int layer_number, int key_head) {
    const CausalModel *m = l->model;
    const CausalBatch *b = l->batch;
    int64_t at = ((int64_t)b->slots[row] * m->layers + layer_number) * m->key_heads + key_head, positions = b->positions_of_slot;
    int size = padded_head(m->head_size);
    return (Region){b->keys + at * (positions / 16) * key_bytes(m->cache, size), b->values + at * positions * value_bytes(m->cache, size)};
}

/* Write the rows' keys and values to the caches, and rotate the queries in place. */
static void keep_rows(Context *c, int number, int layer_number, int64_t stride) {
    Causal *l = c->causal;
    const CausalModel *m = l->model;
    const CausalBatch *b = l->batch;
    const CausalLayer *layer = &m->layer[layer_number];
    int first, last, size = m->head_size, all = m->heads + m->key_heads;
    float turned[LARGEST_HEAD];
    share(b->rows * all, c->threads, number, &first, &last);
    for (int unit = first; unit < last; unit++) {
        int row = unit / all, head = unit % all, position = b->positions[row];
        float *packed = l->packed + row * stride;
        const float *angles = layer->rope < 0 ? NULL : b->rope[layer->rope] + (int64_t)position * 2 * layer->turned;
        if (head < m->heads) {
            if (!layer->query_norm.gamma && !angles) continue;
            turn(c, layer, &layer->query_norm, angles, size, packed + head * size, turned);
            memcpy(packed + head * size, turned, sizeof(float) * (size_t)size);
            continue;
        }
        const float *value = packed + (m->key_heads + head) * size;
        Region region = region_of(l, row, layer_number, head - m->heads);
        turn(c, layer, &layer->key_norm, angles, size, packed + head * size, turned);
        c->kernels->keep_seen(m->cache, turned, value, size, position, region.keys, region.values);
    }
}

/* Compute attention of ``heads`` heads, which share keys and values, for ``rows`` rows of one slot. ``next``: the row after them, from its
 * head ``next_head`` on. */
static void attend(Context *c, int number, int layer_number, int row, int rows, int head, int heads, int next, int next_head,
                   int64_t stride, int64_t out_stride) {
    Causal *l = c->causal;
    const CausalModel *m = l->model;
    const CausalBatch *b = l->batch;
    int count = 0, size = m->head_size, window = m->layer[layer_number].window, shared = m->heads / m->key_heads;
    Region region = region_of(l, row, layer_number, head / shared);
    const uint8_t *later = next < b->rows ? region_of(l, next, layer_number, next_head / shared).keys : region.keys;
    Seen seen = {region.keys, region.values, m->cache, size, m->scale, m->attention_cap, later};
    SeenBy by[MOST_QUERIES];
    for (int r = row; r < row + rows; r++)
        for (int h = head; h < head + heads; h++) {
            int n = b->positions[r] + 1;
            by[count++] = (SeenBy){l->packed + r * stride + h * size, l->attended + r * out_stride + h * size,
                                   window && n > window ? n - window : 0, n};
        }
    c->kernels->attend_seen(&seen, count, by, l->scores[number]);
}

static void attend_rows(Context *c, int number, int layer_number, int64_t stride, int64_t out_stride) {
    const CausalModel *m = c->causal->model;
    const CausalBatch *b = c->causal->batch;
    int shared = m->heads / m->key_heads, at_once = c->kernels->seen_queries, most = shared < at_once ? shared : at_once;
    int first, last;
    if (b->rows < 4 * c->threads) { /* split the heads of each row */
        share(b->rows * m->heads, c->threads, number, &first, &last);
        for (int unit = first, heads; unit < last; unit += heads) {
            int head = unit % m->heads;
            heads = shared - head % shared;
            if (heads > last - unit) heads = last - unit;
            if (heads > most) heads = most;
            attend(c, number, layer_number, unit / m->heads, 1, head, heads, (unit + heads) / m->heads, (unit + heads) % m->heads,
                   stride, out_stride);
        }
        return;
    }
    /* Threads take rows in turn, because later rows of a prompt attend to more positions. Rows of one slot are computed together. */
    int together = at_once / most;
    for (int row = number * together; row < b->rows; row += c->threads * together) {
        int end = row + together < b->rows ? row + together : b->rows;
        for (int from = row, rows; from < end; from += rows) {
            for (rows = 1; from + rows < end && b->slots[from + rows] == b->slots[from];) rows++;
            for (int head = 0, heads; head < m->heads; head += heads) {
                heads = shared - head % shared < most ? shared - head % shared : most;
                int more = head + heads < m->heads, next = more ? from : from + rows < end ? from + rows : row + c->threads * together;
                attend(c, number, layer_number, from, rows, head, heads, next, more ? head + heads : 0, stride, out_stride);
            }
        }
    }
}

/* Add a block's output, normalized if it has a norm, to the residual. */
static void add_block(Context *c, int number, const Norm *norm, int rows) {
    Causal *l = c->causal;
    int first, last, hidden = l->model->hidden, stride = wide(hidden);
    share(rows, c->threads, number, &first, &last);
    for (int row = first; row < last; row++) {
        float *x = l->x + (int64_t)row * stride, *y = l->y + (int64_t)row * stride;
        if (norm->gamma) c->kernels->normalize(norm, y, y, hidden);
        for (int i = 0; i < hidden; i++) x[i] += y[i];
    }
}

static void step_causal(Context *c, int number) {
    Causal *l = c->causal;
    const CausalModel *m = l->model;
    const CausalBatch *b = l->batch;
    int first, last, rows = b->rows, width = wide(m->heads * m->head_size);
    int64_t hidden = wide(m->hidden), packed = wide((m->heads + 2 * m->key_heads) * m->head_size), inner = inner_of(m);
    const Given *given;
    share(rows, c->threads, number, &first, &last);
    for (int row = first; row < last; row++) look_up(c, b->tokens[row], b->positions[row], l->x + row * hidden);
    barrier(c);
    for (int i = 0; i < m->layers; i++) {
        const CausalLayer *layer = &m->layer[i];
        given = prepare(c, number, l->x, hidden, NULL, rows, &layer->attention_norm, &layer->qkv);
        product(c, number, given, &layer->qkv, rows, 0, l->packed, packed);
        barrier(c);
        keep_rows(c, number, i, packed);
        barrier(c);
        attend_rows(c, number, i, packed, width);
        barrier(c);
        int aside = layer->parallel || layer->after_attention.gamma;
        given = prepare(c, number, l->attended, width, NULL, rows, NULL, &layer->out);
        product(c, number, given, &layer->out, rows, !aside, aside ? l->y : l->x, hidden);
        barrier(c);
        if (aside && !layer->parallel) {
            add_block(c, number, &layer->after_attention, rows);
            barrier(c);
        }
        given = prepare(c, number, l->x, hidden, NULL, rows, &layer->feed_forward_norm, &layer->up);
        if (layer->parallel) {
            barrier(c);
            add_block(c, number, &layer->after_attention, rows);
        }
        widen(c, number, given, layer, rows, l->middle, inner);
        barrier(c);
        aside = layer->after_feed_forward.gamma != NULL;
        given = prepare(c, number, l->middle, inner, NULL, rows, NULL, &layer->down);
        product(c, number, given, &layer->down, rows, !aside, aside ? l->y : l->x, hidden);
        barrier(c);
        if (aside) {
            add_block(c, number, &layer->after_feed_forward, rows);
            barrier(c);
        }
    }
    if (!b->wanted) return;
    given = prepare(c, number, l->x, hidden, b->places, b->wanted, &m->norm, &m->head);
    product(c, number, given, &m->head, b->wanted, 0, b->logits, m->head.out);
    if (m->logit_cap <= 0.0f) return;
    barrier(c);
    share(b->wanted, c->threads, number, &first, &last);
    for (int row = first; row < last; row++)
        c->kernels->cap_values(b->logits + (int64_t)row * m->head.out, m->head.out, m->logit_cap);
}

/* Return whether a block's output is normalized, or added later than computed. */
static int keeps_outputs(const CausalModel *m) {
    for (int i = 0; i < m->layers; i++)
        if (m->layer[i].parallel || m->layer[i].after_attention.gamma || m->layer[i].after_feed_forward.gamma) return 1;
    return 0;
}

/* Lay out ``l->memory`` for ``rows`` rows. Returns the number of bytes they need. */
static int64_t lay_rows(Causal *l, int rows) {
    const CausalModel *m = l->model;
    int64_t size = sizeof(float) * (int64_t)rows, used = 0, middle;
    l->x = take(l->memory, &used, size * wide(m->hidden));
    l->y = keeps_outputs(m) ? take(l->memory, &used, size * wide(m->hidden)) : NULL;
    middle = used;
    l->packed = take(l->memory, &used, size * wide((m->heads + 2 * m->key_heads) * m->head_size));
    l->attended = take(l->memory, &used, size * wide(m->heads * m->head_size));
    l->middle = take(l->memory, &middle, size * inner_of(m));
    if (middle > used) used = middle;
    lay_given(&l->given, l->memory, &used, rows, widest_of(m));
    return used;
}

/* Allocate memory for ``rows`` rows that attend to ``positions`` positions, that of the rows in one piece: the allocator keeps
 * many smaller ones when they are freed. Returns 0 if out of memory. */
static int make_room(Context *c, int rows, int positions) {
    Causal *l = c->causal;
    if (rows > l->capacity) {
        l->capacity = 0;
        give_up(l->memory);
        l->memory = NULL;
        if (!(l->memory = room(NULL, lay_rows(l, rows)))) return 0;
        lay_rows(l, rows);
        l->capacity = rows;
    }
    if (positions > l->room) {
        l->room = 0;
        for (int i = 0; i < c->threads; i++)
            if (!(l->scores[i] = room(l->scores[i], (int64_t)sizeof(float) * MOST_QUERIES * (positions + 32)))) return 0;
        l->room = positions;
    }
    return 1;
}

API void deploykit_free_causal(Context *c) {
    Causal *l = c->causal;
    for (int i = 0; i < c->threads && l->own && l->normed && l->scores; i++) {
        give_up(l->own[i].rows);
        give_up(l->normed[i]);
        give_up(l->scores[i]);
    }
    give_up(l->memory);
    free(l->own);
    free(l->normed);
    free(l->scores);
    deploykit_free(c);
    free(l);
}

API Context *deploykit_new_causal(const CausalModel *model, int threads) {
    Context *c = deploykit_new(NULL, NULL, threads);
    Causal *l = calloc(1, sizeof(Causal));
    if (!c || !l) {
        free(l);
        if (c) deploykit_free(c);
        return NULL;
    }
    c->causal = l;
    l->model = model;
    l->own = calloc((size_t)c->threads, sizeof(Given));
    l->normed = calloc((size_t)c->threads, sizeof(float *));
    l->scores = calloc((size_t)c->threads, sizeof(float *));
    int there = l->own && l->normed && l->scores;
    for (int i = 0; there && i < c->threads; i++) {
        there = new_given(&l->own[i], widest_of(model));
        there = (l->normed[i] = room(NULL, (int64_t)sizeof(float) * wide(model->hidden))) && there;
    }
    if (there) return c;
    deploykit_free_causal(c);
    return NULL;
}

/* Return the number of tokens that take little longer than one token. */
API int deploykit_tokens_of_a_step(const Context *c) {
    int together = c->causal->model->layer->qkv.kind == INT8 ? c->kernels->unit : 1;
    return together > MOST_ROWS ? together : MOST_ROWS;
}

/* Compute the tokens of ``batch``. Returns 0 if out of memory. */
API int deploykit_step_causal(Context *c, const CausalBatch *batch) {
    int longest = 0;
    for (int i = 0; i < batch->rows; i++)
        if (batch->positions[i] >= longest) longest = batch->positions[i] + 1;
    if (!make_room(c, batch->rows, longest)) return 0;
    c->causal->batch = batch;
    run(c, step_causal);
    return 1;
}
