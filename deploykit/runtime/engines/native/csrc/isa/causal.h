/* Kernels of language models: rounding of rows, products, and attention over float16 caches. */
#pragma once

#ifndef SEEN_QUERIES
#define SEEN_QUERIES 6 /* of attend_seen, whose sums stay in registers */
#endif

INLINE int blocks_given(const Matrix *m) { return blocks_of(m->in); }

static void give(const Given *to, const Matrix *next, int row, const float *x) {
    int n = next->in, blocks = blocks_given(next);
    uint8_t *y = to->rows + row * to->stride;
    float *steps = to->steps + row * to->apart;
    if (next->kind == FLOAT32) {
        for (int i = 0; i < BLOCK * blocks; i += 16) f_store((float *)y + i, f_load_some(x + i, n - i));
    } else if (next->kind == INT8) {
        float highest = largest_of(x, n), levels = (float)next->levels;
        Floats inverse = f_set(highest > 1e-30f ? levels / highest : 0.0f);
        for (int i = 0; i < BLOCK * blocks; i += 16)
            i_put_shorts((int16_t *)y + i, i_round(f_mul(f_load_some(x + i, n - i), inverse)));
        steps[0] = highest / levels;
    } else {
        for (int b = 0; b < blocks; b++, x += BLOCK, n -= BLOCK, y += BLOCK) {
            Floats low = f_load_some(x, n), high = f_load_some(x + 16, n - 16);
            float highest = f_highest(f_max(f_abs(low), f_abs(high)));
            Floats inverse = f_set(highest > 1e-30f ? 127.0f / highest : 0.0f);
            Ints a = i_round(f_mul(low, inverse)), c = i_round(f_mul(high, inverse));
            i_put_bytes(y, a);
            i_put_bytes(y + 16, c);
            steps[b] = highest / 127.0f;
            steps[blocks + b] = steps[b] * (float)i_sum(i_add(a, c));
        }
    }
}

INLINE void multiply_panel(const Given *from, const Matrix *m, int row, int rows, int panel, int add, float *out,
                           int64_t stride, Ahead ahead) {
    const uint8_t *x = from->rows + row * from->stride;
    const float *steps = from->steps + row * from->apart;
#define ROWS(n) \
    if (m->kind == INT8) tile_shorts(n, x, from->stride, steps, from->apart, m, panel, add, out, stride, ahead); \
    else if (m->kind == INT4) tile_nibbles(n, x, from->stride, steps, from->apart, m, panel, add, out, stride, ahead); \
    else tile_floats(n, x, from->stride, m, panel, add, out, stride); \
    break
    switch (rows) {
    case 1: ROWS(1);
    case 2: ROWS(2);
    case 3: ROWS(3);
    case 4: ROWS(4);
    case 5: ROWS(5);
    default: ROWS(6);
    }
#undef ROWS
}

static void multiply(const Given *from, const Matrix *m, int row, int rows, int panel, int panels, int add, float *out,
                     int64_t stride, Ahead ahead) {
    for (int i = 0; i < panels; i++) multiply_panel(from, m, row, rows, panel + i, add, out + i * COLUMNS, stride, ahead);
}

static void pass_gate(int activation, int gated, const float *x, int64_t apart, int rows, float *out, int64_t stride) {
    for (; rows--; x += apart, out += stride) {
        Floats v = activated(activation, f_load(x));
        f_store(out, gated ? f_mul(v, f_load(x + COLUMNS)) : v);
    }
}

INLINE Floats capped(Floats x, float cap) { return f_mul(activated(TANH, f_div(x, f_set(cap))), f_set(cap)); }

static void cap_values(float *x, int n, float cap) {
    for (int i = 0; i < n; i += 16) f_store_some(x + i, capped(f_load_some(x + i, n - i), cap), n - i);
}

/* Write a head's key and value at a position. */
static void keep_halves(const float *key, const float *value, int size, int position, uint16_t *keys, uint16_t *values) {
    int padded = padded_head(size);
    Floats most = f_set(65504.0f), least = f_set(-65504.0f); /* of float16 */
    uint16_t *to = keys + (int64_t)(position / 16 * 16) * padded + position % 16;
    values += (int64_t)position * padded;
    for (int i = 0; i < padded; i += 16, to += 256) {
        uint16_t halves[16];
        f_store_halves(halves, f_max(f_min(f_load_some(key + i, size - i), most), least));
        for (int j = 0; j < 16; j++) to[16 * j] = halves[j];
        f_store_halves(values + i, f_max(f_min(f_load_some(value + i, size - i), most), least));
    }
}

#define EACH_QUERY _Pragma("GCC unroll 12") for (int g = 0; g < queries; g++) /* unrolled, so that sums stay in registers */

/* The positions among 16 from ``t`` on that a query sees. */
INLINE uint32_t seen_from(const SeenBy *q, int t) { return tail(q->n - t) & ~tail(q->first - t); }

/* Write the scores of ``spans`` times 16 positions, and update the highest ones. */
INLINE void score(const int queries, const int spans, const Seen *s, const SeenBy *q, int t, float *scores, int64_t apart,
                  Floats *highest) {
    int64_t span = 16 * padded_head(s->size);
    const uint16_t *keys = s->keys + t / 16 * span;
    Floats sums[SEEN_QUERIES];
    for (int g = 0; g < queries * spans; g++) sums[g] = f_zero();
    for (int i = 0; i < s->size; i++, keys += 16)
#pragma GCC unroll 12
        for (int j = 0; j < spans; j++) {
            Floats key = f_load_halves(keys + j * span);
            EACH_QUERY sums[j * queries + g] = f_fma(key, f_set(q[g].query[i]), sums[j * queries + g]);
        }
#pragma GCC unroll 12
    for (int j = 0; j < spans; j++)
        EACH_QUERY {
            Floats x = f_mul(sums[j * queries + g], f_set(s->scale));
            if (s->cap > 0.0f) x = capped(x, s->cap);
            x = f_select(seen_from(&q[g], t + 16 * j), f_set(-INFINITY), x);
            highest[g] = f_max(highest[g], x);
            f_store(scores + g * apart + 16 * j, x);
        }
}

/* Write ``spans`` times 16 values of a head: those of the positions from ``begin`` to ``end``, weighed by ``shares``. */
INLINE void weigh(const int queries, const int spans, const Seen *s, const SeenBy *q, int begin, int end, int i,
                  const float *shares, int64_t apart, const Floats *whole) {
    int padded = padded_head(s->size);
    const uint16_t *values = s->values + (int64_t)begin * padded + i;
    Floats sums[SEEN_QUERIES];
    for (int g = 0; g < queries * spans; g++) sums[g] = f_zero();
    for (int t = begin; t < end; t++, values += padded, shares++)
#pragma GCC unroll 12
        for (int j = 0; j < spans; j++) {
            Floats value = f_load_halves(values + 16 * j);
            EACH_QUERY sums[j * queries + g] = f_fma(value, f_set(shares[g * apart]), sums[j * queries + g]);
        }
#pragma GCC unroll 12
    for (int j = 0; j < spans; j++)
        EACH_QUERY f_store_some(q[g].out + i + 16 * j, f_mul(sums[j * queries + g], whole[g]), s->size - i - 16 * j);
}

/* Positions that one query sees and another does not have a share of 0, which changes no sum. */
INLINE void attend_few(const int queries, const Seen *s, const SeenBy *q, float *scores) {
    const int spans = SEEN_QUERIES / queries;
    int begin = q->first, end = q->n, padded = padded_head(s->size), t, i;
    for (int g = 1; g < queries; g++) {
        if (q[g].first < begin) begin = q[g].first;
        if (q[g].n > end) end = q[g].n;
    }
    int start = begin / 16 * 16;
    int64_t apart = (end - start + 15) / 16 * 16;
    Floats highest[SEEN_QUERIES], sum[SEEN_QUERIES], whole[SEEN_QUERIES];
    EACH_QUERY {
        highest[g] = f_set(-INFINITY);
        sum[g] = f_zero();
    }
    for (t = start; t + 16 * spans <= end; t += 16 * spans) score(queries, spans, s, q, t, scores + t - start, apart, highest);
    for (; t < end; t += 16) score(queries, 1, s, q, t, scores + t - start, apart, highest);
    EACH_QUERY highest[g] = f_set(f_highest(highest[g]));
    for (t = start; t < end; t += 16)
        EACH_QUERY {
            float *at = scores + g * apart + t - start;
            Floats e = f_select(seen_from(&q[g], t), f_zero(), exponential(f_sub(f_load(at), highest[g])));
            f_store(at, e);
            sum[g] = f_add(sum[g], e);
        }
    EACH_QUERY whole[g] = f_set(1.0f / f_sum(sum[g]));
    scores += begin - start;
    for (i = 0; i + 16 * spans <= padded; i += 16 * spans) weigh(queries, spans, s, q, begin, end, i, scores, apart, whole);
    for (; i < padded; i += 16) weigh(queries, 1, s, q, begin, end, i, scores, apart, whole);
}

static void attend_seen(const Seen *s, int queries, const SeenBy *q, float *scores) {
    switch (queries) {
#define CASE(n) case n: attend_few(n, s, q, scores); break
    CASE(1);
    CASE(2);
    CASE(3);
    CASE(4);
    CASE(5);
    CASE(6);
#if SEEN_QUERIES > 6
    CASE(7);
    CASE(8);
    CASE(9);
    CASE(10);
    CASE(11);
    CASE(12);
#endif
#undef CASE
    }
}
