/* Compare the kernels of every instruction set that this CPU has with those in plain C, bit for bit, on random small shapes.
 * Prints the instruction sets, fastest first. test_native_on_arm.py compiles this with the engine for other CPUs, and emulates them. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../deploykit/runtime/engines/native/csrc/kernels.h"

#define ROUNDS 25 /* of each case, with other shapes and values */
#define MEMORY (4 << 20)
#define THREADS 3

const Kernels *deploykit_kernels(int number);

static uint64_t state;
static char *memory;
static uint8_t *shown; /* what a case computed */
static int64_t used, length;

static uint32_t draw(void) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)(state * 0x2545f4914f6cdd1dull >> 32);
}
static int from_to(int least, int most) { return least + (int)(draw() % (uint32_t)(most - least + 1)); }
static int up_to(int n, int to) { return (n + to - 1) / to * to; }

/* Memory filled with bytes that no kernel writes by chance. */
static void *take(int64_t bytes) {
    void *at = memory + used;
    used = (used + bytes + 63) / 64 * 64;
    if (used > MEMORY) abort();
    return memset(at, 0x5a, (size_t)bytes);
}
static void show(const void *at, int64_t bytes) {
    if (length + bytes > MEMORY) abort();
    memcpy(shown + length, at, (size_t)bytes);
    length += bytes;
}

/* Floats of many magnitudes, with some zeros. */
static float *floats(int64_t n) {
    float *x = take(4 * n);
    for (int64_t i = 0; i < n; i++) {
        double normal = 0.0;
        for (int j = 0; j < 4; j++) normal += draw() / 4294967296.0 - 0.5;
        x[i] = draw() % 20 ? (float)ldexp(normal, from_to(-12, 4)) : 0.0f;
    }
    return x;
}
/* Signed bytes, a third of them at the ends of the range, where sums are largest. */
static int8_t *signed_bytes(int64_t n) {
    static const int8_t ENDS[4] = {-128, 127, 127, -127};
    int8_t *x = take(n);
    for (int64_t i = 0; i < n; i++) x[i] = draw() % 3 ? (int8_t)from_to(-127, 127) : ENDS[draw() % 4];
    return x;
}

static void linear_layer(const Kernels *k) {
    int in = from_to(1, 210), out = from_to(1, 130), rows = from_to(1, 40), add = from_to(0, 1), wide = filled(out), read = filled(in);
    int activation = draw() % 2 ? from_to(NONE, TANH) : NONE;
    int quads = (in + 3) / 4, groups = groups_of(rows, k->rows);
    int32_t *offset = take(4 * wide);
    Linear l = {.scale = floats(wide), .offset = offset, .bias = floats(wide), .in = in, .out = out, .is_float = draw() % 3 == 0};
    Rows to = {take(4 * rows * read), take((rows + TILE_UNIT) * read), take(4 * rows)};
    float *x = floats(rows * read), *y = floats(rows * wide), *factor = draw() % 2 ? floats(rows * wide) : NULL;
    if (l.is_float) {
        l.weight = floats((int64_t)wide * in);
    } else {
        const int8_t *w = signed_bytes((int64_t)wide * quads * 4);
        l.weight = w;
        memset(offset, 0, 4 * (size_t)wide);
        for (int64_t i = 0; i < (int64_t)wide * quads * 4; i++) offset[i / (256 * quads) * 64 + i / 4 % 64] += 128 * w[i];
    }
    for (int row = 0; row < rows; row++) k->give_row(to, &l, row, x + row * read, 0.37f);
    for (int number = 0; number < groups; number++) {
        Group g = group(rows, k->rows, k->unit, number);
        for (int panel = 0; panel < wide / PANEL; panel++) {
            int64_t at = g.row * wide + panel * PANEL;
            k->tile(to, &l, g, panel, (Then){add, activation, factor ? factor + at : NULL, y + at}, wide);
        }
    }
    if (l.is_float) {
        show(to.given, 4 * rows * read);
    } else {
        for (int i = 0; i < rows * read; i++) to.quantized[i] = (uint8_t)(to.quantized[i] - k->zero);
        show(to.quantized, rows * read);
        show(to.step, 4 * rows);
    }
    show(y, 4 * rows * wide);
}

static void norm(const Kernels *k) {
    int n = from_to(1, 200), padded = up_to(n, 16);
    float *x = floats(padded), *y = take(4 * padded);
    Norm norm = {floats(n), draw() % 2 ? floats(n) : NULL, 1e-5f};
    k->normalize(&norm, x, y, n);
    show(y, 4 * padded);
}

static void activation(const Kernels *k) {
    static const float ODD[8] = {0.0f, -0.0f, 88.0f, -88.0f, 100.0f, -100.0f, 1e30f, -1e30f};
    int rows = from_to(1, 6), kind = from_to(NONE, TANH);
    float *x = floats(rows * 2 * PANEL), *gated = floats(rows * 2 * COLUMNS);
    memcpy(gated + 3, ODD, sizeof(ODD));
    k->pass_gate(kind, draw() % 2, gated, 2 * COLUMNS, rows, x + PANEL, 2 * PANEL);
    k->cap_values(x + 3, from_to(1, PANEL), 30.0f);
    show(x, 4 * rows * 2 * PANEL);
}

static void embedding(const Kernels *k) {
    int hidden = from_to(1, 130), tokens = 70, token = from_to(0, tokens - 1);
    float *x = take(4 * filled(hidden)), *positions = floats(hidden);
    Stack s = {.embedding = signed_bytes(2 * PANEL * up_to(hidden, 4)), .embedding_scale = floats(tokens), .hidden = hidden};
    k->embed_column(&s, token, draw() % 2 ? positions : NULL, x);
    show(x, 4 * up_to(hidden, 16));
    k->embed_row(&s, token, positions, x);
    show(x, 4 * up_to(hidden, 16));
}

static void cached_attention(const Kernels *k) {
    int heads = from_to(1, MOST_HEADS), size = from_to(1, 100), n = from_to(1, 70), slots = from_to(0, 3), distances = 11;
    if (draw() % 8 == 0) size = 256;
    if (draw() % 8 == 0) n = from_to(500, 600), size = 16;
    int padded = padded_head(size), positions = up_to(n, 16), all = (slots ? slots : 1) * heads * positions;
    int8_t *keys = memset(take((int64_t)all * padded), 0, (size_t)all * padded);
    int8_t *values = memset(take((int64_t)all * padded), 0, (size_t)all * padded);
    float *key_scale = memset(take(4 * all), 0, 4 * (size_t)all), *value_scale = memset(take(4 * all), 0, 4 * (size_t)all);
    int32_t *table = take(4 * positions);
    for (int t = 0; t < positions; t++) table[t] = t < n / 2 || !slots ? 0 : from_to(0, slots - 1);
    for (int t = 0; t < n; t++)
        for (int g = 0; g < heads; g++) {
            int64_t at = (table[t] * heads + g) * positions, before = used;
            key_scale[at + t] = k->keep(floats(size), keys + at * padded, size, t, 0);
            value_scale[at + t] = k->keep(floats(size), values + at * padded, size, t, 1);
            used = before;
        }
    Stack s = {.scale = 0.125f, .head_size = size, .distances = distances, .zero_distance = 8, .heads = heads};
    Places places = {slots ? table : NULL, heads * positions, n};
    float *query = floats(heads * size), *bias = floats(heads * distances), *out = take(4 * heads * size);
    k->attend(heads, take(4 * 3 * MOST_HEADS * positions), &s, query, &(Kept){keys, key_scale, positions},
              &(Kept){values, value_scale, positions}, &places, draw() % 2 ? bias : NULL, out);
    show(keys, (int64_t)all * padded);
    show(values, (int64_t)all * padded);
    show(key_scale, 4 * all);
    show(value_scale, 4 * all);
    show(out, 4 * heads * size);
}

static void text_attention(const Kernels *k) {
    int size = from_to(1, 80), n = from_to(1, 50), wide = filled(3 * size);
    float *packed = floats(n * wide), *bias = floats(2 * n - 1), *out = take(4 * n * filled(size));
    Stack s = {.scale = 0.2f, .head_size = size, .distances = 2 * n - 1, .zero_distance = n - 1};
    k->attend_text(&s, &(TextHead){packed, packed + size, packed + 2 * size, draw() % 2 ? bias : NULL, wide, filled(size), out,
                                   take(4 * (QUERIES + padded_head(size)) * up_to(n, 16)), n});
    show(out, 4 * n * filled(size));
}

static void classifier_attention(const Kernels *k) {
    int size = from_to(1, 80), n = draw() % 2 ? from_to(2, 150) : from_to(190, 300); /* AMX has a way for many keys */
    int rows = from_to(1, n < 20 ? n - 1 : 20), wide = filled(3 * size);
    int keys = filled(n), padded = padded_values(size);
    Attention h = {
        .queries = {NULL, take(TEXT_QUERIES * filled(size)), take(4 * TEXT_QUERIES)},
        .keys = take(keys * up_to(size, 4) + KEYS_AFTER),
        .key_scale = take(4 * keys),
        .zeros = memset(take(4 * keys), 0, 4 * (size_t)keys),
        .key_offset = take(4 * keys),
        .values = take(4 * keys / 2 * padded),
        .value_scale = take(4 * padded),
        .scores = take(4 * TEXT_QUERIES * keys),
        .shares = take(2 * TEXT_QUERIES * keys),
        .most = log2f(fminf(32767.0f, (float)(INT32_MAX / MOST_VALUE / n))),
        .n = n,
    };
    h.layer = (Linear){h.keys, h.key_scale, h.key_offset, h.zeros, size, n, 0};
    float *packed = floats(n * wide), *bias = floats(7), *out = take(4 * rows * filled(size));
    Stack s = {.scale = 0.2f, .head_size = size, .distances = 7, .zero_distance = 3, .bias = draw() % 2 ? bias : NULL};
    k->take_head(&h, &s, packed + size, packed + 2 * size, wide);
    for (int number = 0; number < groups_of(rows, k->queries); number++) {
        Group g = group(rows, k->queries, 1, number);
        k->attend_head(&h, &s, 0, packed + g.row * wide, wide, 1 + g.row, g.rows, out + g.row * filled(size), filled(size));
    }
    show(h.keys, keys * up_to(size, 4));
    show(h.value_scale, 4 * padded);
    show(out, 4 * rows * filled(size));
}

static void best_tokens(const Kernels *k) {
    int n = from_to(1, PANEL), best = from_to(0, MOST_BEST), scored = from_to(0, 1);
    Found *found = memset(take(sizeof(Found)), 0, sizeof(Found));
    found->highest = found->threshold = -INFINITY;
    for (int first = 0; first < 5 * PANEL; first += PANEL) {
        float *logits = floats(PANEL);
        for (int i = 0; i < 5; i++) logits[from_to(0, PANEL - 1)] = -INFINITY;
        k->find(found, logits, first, n, best, scored);
    }
    show(found, sizeof(Found));
}

static void vocabulary(const Kernels *k) {
    int n = from_to(1, 3 * SHARES), some = from_to(0, 5);
    float *x = floats(n), *shares = take(4 * n), slope = (float)from_to(1, 2000) / 100.0f;
    int32_t *places = take(4 * n);
    double *sums = take(8 * 4);
    while (some--) x[from_to(0, n - 1)] = -INFINITY;
    float highest = k->highest_of(x, n);
    k->shares_of(x, n, highest, slope, shares, sums);
    int found = k->find_over(x, n, x[from_to(0, n - 1)], places);
    show(&highest, 4);
    show(shares, 4 * n);
    show(sums, 8 * ((n + SHARES - 1) / SHARES));
    show(&found, 4);
    show(places, 4 * found);
}

static void matrix(const Kernels *k) {
    int rows = from_to(1, draw() % 2 ? MOST_ROWS : 70), add = from_to(0, 1), blocks, padded;
    Matrix m = {.in = from_to(1, draw() % 4 ? 300 : 2000), .out = from_to(1, 70), .kind = from_to(FLOAT32, INT4)};
    padded = panels_of(m.out) * COLUMNS, blocks = blocks_of(m.in);
    Given g = {.stride = wide(m.in) * 4, .apart = 2 * blocks};
    g.rows = take(rows * g.stride), g.steps = take(4 * rows * g.apart);
    g.tiles = take((rows + TILE_UNIT) * (wide(m.in) + TILE_BYTES));
    float *x = floats(rows * wide(m.in)), *y = floats(rows * padded);
    m.bias = floats(padded);
    if (m.kind == FLOAT32) {
        m.weight = floats(wide(m.in) * padded);
    } else if (m.kind == INT8) {
        const int8_t *w = signed_bytes(wide(m.in) * padded);
        int32_t *offset = take(4 * padded);
        float *signs = floats(wide(m.in)), *column = floats(wide(m.in));
        m.weight = w, m.scale = floats(padded), m.offset = offset, m.signs = signs;
        memset(offset, 0, 4 * (size_t)padded);
        for (int i = 0; i < wide(m.in) * padded; i++) offset[i / panel_bytes(&m) * COLUMNS + i / 4 % COLUMNS] += 128 * w[i];
        for (int i = 0; i < wide(m.in); i++) signs[i] = signs[i] < 0 ? -1.0f : 1.0f;
        for (m.together = BLOCK; wide(m.in) % (2 * m.together) == 0 && draw() % 8;) m.together *= 2;
        k->transform_back(&m, column);
        show(column, 4 * wide(m.in));
    } else {
        uint16_t *both[2];
        m.weight = signed_bytes(wide(m.in) / 2 * padded);
        for (int i = 0; i < 2; i++) {
            uint32_t *bits = (uint32_t *)floats(blocks * padded);
            both[i] = take(2 * blocks * padded);
            for (int j = 0; j < blocks * padded; j++) both[i][j] = (uint16_t)(bits[j] >> 16);
        }
        m.scale = both[0], m.low = both[1];
    }
    for (int r = 0; r < rows; r++) {
        k->give(&g, &m, r, x + r * wide(m.in));
        if (m.kind != INT8) show(g.rows + r * g.stride, m.kind == FLOAT32 ? 4 * wide(m.in) : wide(m.in)); /* tables store INT8's differently */
        show(g.steps + r * g.apart, m.kind == FLOAT32 ? 0 : m.kind == INT8 ? 4 : 4 * g.apart);
    }
    Ahead ahead = {m.weight, from_to(0, 2)};
    int row = from_to(0, (rows - 1) / TILE_UNIT) * TILE_UNIT, each = from_to(1, MOST_PANELS);
    if (each > k->panels) each = k->panels;
    for (int panel = 0; panel < panels_of(m.out); panel += each) {
        int panels = panels_of(m.out) - panel < each ? panels_of(m.out) - panel : each;
        for (int i = 0; i < groups_of(rows, k->matrix_rows); i++) {
            Group some = group(rows, k->matrix_rows, k->unit, i);
            k->multiply(&g, &m, some.row, some.rows, panel, panels, add, y + some.row * padded + panel * COLUMNS, padded, ahead);
        }
        k->multiply(&g, &m, row, 1, panel, panels, 1, y + row * padded + panel * COLUMNS, padded, ahead);
    }
    show(y, 4 * rows * padded);
}

static void seen_attention(const Kernels *k) {
    int size = from_to(1, 80), n = from_to(1, 100), queries = from_to(1, MOST_QUERIES), padded = padded_head(size);
    int kinds[3] = {FLOAT16, FLOAT32, INT8}, kind = kinds[from_to(0, 2)];
    int of_keys = up_to(n, 16) / 16 * (int)key_bytes(kind, padded), of_values = up_to(n, 16) * (int)value_bytes(kind, padded);
    uint8_t *keys = take(of_keys), *values = take(of_values);
    SeenBy by[MOST_QUERIES];
    float *out = take(4 * queries * padded);
    for (int t = 0; t < n; t++) k->keep_seen(kind, floats(size), floats(size), size, t, keys, values);
    for (int g = 0; g < queries; g++) {
        int last = from_to(1, n);
        by[g] = (SeenBy){floats(padded), out + g * padded, from_to(0, last - 1), last};
    }
    Seen s = {keys, values, kind, size, 0.3f, draw() % 2 ? 20.0f : 0.0f, keys};
    float *scores = take(4 * queries * up_to(n + 32, 16));
    for (int g = 0, some; g < queries; g += some) {
        some = queries - g < k->seen_queries ? queries - g : k->seen_queries;
        k->attend_seen(&s, some, by + g, scores);
    }
    show(keys, of_keys);
    show(values, of_values);
    show(out, 4 * queries * padded);
}

static const struct {
    const char *name;
    void (*run)(const Kernels *k);
} CASES[] = {
    {"linear layer", linear_layer}, {"norm", norm}, {"activation", activation}, {"embedding", embedding},
    {"attention to a cache", cached_attention}, {"attention of an encoder", text_attention},
    {"attention of a classifier", classifier_attention}, {"best tokens", best_tokens}, {"vocabulary", vocabulary},
    {"matrix", matrix}, {"attention to float16", seen_attention},
};

static void run_case(int number, int round, const Kernels *k) {
    used = length = 0;
    state = 0x9e3779b97f4a7c15ull * (uint64_t)(1000 * number + round + 1);
    CASES[number].run(k);
}

/* Each thread adds its number to the counts of all others, one after another. */
static int64_t counts[THREADS];
static void add_all(Context *c, int number) {
    for (int i = 0; i < c->threads; i++) {
        counts[(number + i) % c->threads] += number + 1;
        barrier(c);
    }
}

static int threads_meet(void) {
    Context *c = deploykit_new(NULL, NULL, THREADS);
    if (!c || c->threads != THREADS) return 0;
    for (int i = 0; i < ROUNDS; i++) run(c, add_all);
    deploykit_free(c);
    for (int i = 0; i < THREADS; i++)
        if (counts[i] != ROUNDS * THREADS * (THREADS + 1) / 2) return 0;
    return 1;
}

int main(void) {
    int sets = 0, wrong = 0;
    uint8_t *expected = malloc(MEMORY);
    if (!expected || !(shown = malloc(MEMORY)) || !(memory = room(NULL, MEMORY))) return 2;
    for (; deploykit_kernels(sets); sets++) printf("%s%s", sets ? " " : "", deploykit_kernels(sets)->name);
    printf("\n");
    for (int number = 0; number < (int)(sizeof(CASES) / sizeof(CASES[0])); number++)
        for (int round = 0; round < ROUNDS; round++) {
            run_case(number, round, deploykit_kernels(sets - 1));
            int64_t bytes = length;
            memcpy(expected, shown, (size_t)bytes);
            for (int i = 0; i < sets - 1; i++) {
                int64_t at = 0;
                run_case(number, round, deploykit_kernels(i));
                while (at < bytes && expected[at] == shown[at]) at++;
                if (length == bytes && at == bytes) continue;
                fprintf(stderr, "%s: %s, round %d: byte %lld of %lld differs\n", deploykit_kernels(i)->name, CASES[number].name,
                        round, (long long)at, (long long)bytes);
                wrong = 1;
            }
        }
    if (!threads_meet()) wrong = fprintf(stderr, "threads do not wait for each other\n") > 0;
    return wrong;
}
