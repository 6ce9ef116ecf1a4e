/* Kernels of language models: rounding of rows, products, and attention over caches. */
#pragma once

#ifndef SEEN_QUERIES
#define SEEN_QUERIES 6 /* of attend_seen, whose sums stay in registers */
#endif

INLINE int blocks_given(const Matrix *m) { return blocks_of(m->in); }

/* Compute the Hadamard transform of each ``together`` of ``n`` values, without its scale. */
INLINE void transform(float *x, int n, int together) {
    int apart = 16;
    for (int i = 0; i < n; i += 16) f_store(x + i, f_transform(f_load(x + i)));
    for (; 2 * apart < together; apart *= 4) /* two steps in one pass */
        for (int i = 0; i < n; i += 4 * apart)
            for (int j = i; j < i + apart; j += 16) {
                Floats a = f_load(x + j), b = f_load(x + j + apart), c = f_load(x + j + 2 * apart), d = f_load(x + j + 3 * apart);
                Floats e = f_add(a, b), f = f_sub(a, b), g = f_add(c, d), h = f_sub(c, d);
                f_store(x + j, f_add(e, g));
                f_store(x + j + apart, f_add(f, h));
                f_store(x + j + 2 * apart, f_sub(e, g));
                f_store(x + j + 3 * apart, f_sub(f, h));
            }
    for (int i = 0; apart < together && i < n; i += 2 * apart)
        for (int j = i; j < i + apart; j += 16) {
            Floats a = f_load(x + j), b = f_load(x + j + apart);
            f_store(x + j, f_add(a, b));
            f_store(x + j + apart, f_sub(a, b));
        }
}

/* The transform is symmetric, and its scale is in the weights. */
static void transform_back(const Matrix *m, float *x) {
    int n = wide(m->in);
    transform(x, n, m->together);
    for (int i = 0; i < n; i += 16) f_store(x + i, f_mul(f_load(x + i), f_load(m->signs + i)));
}

/* Store 16 inputs of an INT8 matrix, from ``i`` on. With SHORTS they take 16 bits, and each four have the order 0, 2, 1, 3: the even
 * bytes of four weights become a pair of 16-bit numbers, and the odd ones another. */
INLINE void put_given(uint8_t *y, int i, Ints v) {
#ifdef SHORTS
    i_put_shorts((int16_t *)y + i, i_swap_middle(v));
#else
    i_put_bytes(y + i, i_add(v, i_set(ZERO)));
#endif
}

static void give(const Given *to, const Matrix *next, int row, const float *x) {
    int n = next->in, blocks = blocks_given(next);
    uint8_t *y = to->rows + row * to->stride;
    float *steps = to->steps + row * to->apart;
    if (next->kind == FLOAT32) {
        for (int i = 0; i < BLOCK * blocks; i += 16) f_store((float *)y + i, f_load_some(x + i, n - i));
    } else if (next->kind == INT8) {
        float *z = (float *)y; /* rounded values replace those that were read before */
        for (int i = 0; i < BLOCK * blocks; i += 16) f_store(z + i, f_mul(f_load_some(x + i, n - i), f_load(next->signs + i)));
        transform(z, BLOCK * blocks, next->together);
        float highest = largest_of(z, BLOCK * blocks);
        Floats inverse = f_set(highest > 1e-30f ? 127.0f / highest : 0.0f);
        for (int i = 0; i < BLOCK * blocks; i += 16) put_given(y, i, i_round(f_mul(f_load(z + i), inverse)));
        steps[0] = highest / 127.0f;
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
    if (m->kind == INT8) tile_bytes(n, x, from->stride, steps, from->apart, m, panel, add, out, stride, ahead); \
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

/* Round ``size`` values to bytes, ``apart`` bytes apart. Returns their scale. */
INLINE float keep_bytes(const float *x, int size, int8_t *to, int apart) {
    float highest = largest_of(x, size);
    Floats inverse = f_set(highest > 1e-30f ? 127.0f / highest : 0.0f);
    for (int i = 0; i < padded_head(size); i += 16) {
        int8_t bytes[16];
        i_put_bytes(bytes, i_round(f_mul(f_load_some(x + i, size - i), inverse)));
        for (int j = 0; j < 16; j++) to[(i + j) * apart] = bytes[j];
    }
    return highest / 127.0f;
}

static void keep_seen(int kind, const float *key, const float *value, int size, int position, uint8_t *keys, uint8_t *values) {
    int padded = padded_head(size), lane = position % 16;
    keys += position / 16 * key_bytes(kind, padded);
    values += position * value_bytes(kind, padded);
    if (kind == INT8) {
        float *scales = (float *)(keys + 16 * padded) + lane;
        scales[0] = keep_bytes(key, size, (int8_t *)keys + lane, 16);
        scales[16] = keep_bytes(value, size, (int8_t *)values, 1);
        return;
    }
    Floats most = f_set(65504.0f), least = f_set(-65504.0f); /* of float16 */
    for (int i = 0; i < padded; i += 16) {
        Floats k = f_load_some(key + i, size - i), v = f_load_some(value + i, size - i);
        if (kind == FLOAT32) {
            float some[16];
            f_store(some, k);
            for (int j = 0; j < 16; j++) ((float *)keys)[16 * (i + j) + lane] = some[j];
            f_store((float *)values + i, v);
        } else {
            uint16_t some[16];
            f_store_halves(some, f_max(f_min(k, most), least));
            for (int j = 0; j < 16; j++) ((uint16_t *)keys)[16 * (i + j) + lane] = some[j];
            f_store_halves((uint16_t *)values + i, f_max(f_min(v, most), least));
        }
    }
}

INLINE Floats load_seen(const int kind, const uint8_t *x) {
    if (kind == FLOAT32) return f_load((const float *)x);
    return kind == INT8 ? f_from(i_load_bytes((const int8_t *)x, 16)) : f_load_halves((const uint16_t *)x);
}

#define EACH_QUERY _Pragma("GCC unroll 12") for (int g = 0; g < queries; g++) /* unrolled, so that sums stay in registers */

/* The positions among 16 from ``t`` on that a query attends to. */
INLINE uint32_t seen_from(const SeenBy *q, int t) { return tail(q->n - t) & ~tail(q->first - t); }

INLINE void prefetch_bytes(const uint8_t *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

/* Write the scores of ``spans`` times 16 positions, and update the highest ones. Prefetches their values. */
INLINE void score(const int kind, const int queries, const int spans, const Seen *s, const SeenBy *q, int t, float *scores,
                  int64_t apart, Floats *highest) {
    int padded = padded_head(s->size);
    int64_t span = key_bytes(kind, padded), sixteen = value_bytes(kind, 16);
    const uint8_t *group = s->keys + t / 16 * span, *keys = group;
    Floats sums[SEEN_QUERIES];
    for (int g = 0; g < queries * spans; g++) sums[g] = f_zero();
    const uint8_t *values = s->values + t * value_bytes(kind, padded);
    for (int i = 0; i < s->size; i++, keys += sixteen, values += spans * sixteen) {
        prefetch_bytes(values, spans * sixteen);
#pragma GCC unroll 12
        for (int j = 0; j < spans; j++) {
            Floats key = load_seen(kind, keys + j * span);
            EACH_QUERY sums[j * queries + g] = f_fma(key, f_set(q[g].query[i]), sums[j * queries + g]);
        }
    }
#pragma GCC unroll 12
    for (int j = 0; j < spans; j++)
        EACH_QUERY {
            Floats x = f_mul(sums[j * queries + g], f_set(s->scale));
            if (kind == INT8) x = f_mul(x, f_load((const float *)(group + j * span + 16 * padded)));
            if (s->cap > 0.0f) x = capped(x, s->cap);
            x = f_select(seen_from(&q[g], t + 16 * j), f_set(-INFINITY), x);
            highest[g] = f_max(highest[g], x);
            f_store(scores + g * apart + 16 * j, x);
        }
}

/* Write ``spans`` times 16 values of a head: those of the positions from ``begin`` to ``end``, weighed by ``shares``. Prefetches
 * as much of the next keys. */
INLINE void weigh(const int kind, const int queries, const int spans, const Seen *s, const SeenBy *q, int begin, int end,
                  int i, const float *shares, int64_t apart, const Floats *whole) {
    int64_t bytes = value_bytes(kind, padded_head(s->size));
    const uint8_t *values = s->values + begin * bytes + value_bytes(kind, i), *next = s->next + value_bytes(kind, i);
    Floats sums[SEEN_QUERIES];
    for (int g = 0; g < queries * spans; g++) sums[g] = f_zero();
    for (int t = begin; t < end; t++, values += bytes, next += bytes, shares++) {
        prefetch_bytes(next, value_bytes(kind, 16 * spans));
#pragma GCC unroll 12
        for (int j = 0; j < spans; j++) {
            Floats value = load_seen(kind, values + value_bytes(kind, 16 * j));
            EACH_QUERY sums[j * queries + g] = f_fma(value, f_set(shares[g * apart]), sums[j * queries + g]);
        }
    }
#pragma GCC unroll 12
    for (int j = 0; j < spans; j++)
        EACH_QUERY f_store_some(q[g].out + i + 16 * j, f_mul(sums[j * queries + g], whole[g]), s->size - i - 16 * j);
}

/* A position that a query does not attend to has a share of 0, which changes no sum. INT8: shares are multiplied by the
 * values' scales. */
INLINE void attend_few(const int kind, const int queries, const Seen *s, const SeenBy *q, float *scores) {
    const int spans = SEEN_QUERIES / queries;
    int begin = q->first, end = q->n, padded = padded_head(s->size), t, i;
    for (int g = 1; g < queries; g++) {
        if (q[g].first < begin) begin = q[g].first;
        if (q[g].n > end) end = q[g].n;
    }
    int start = begin / 16 * 16;
    int64_t apart = (end - start + 15) / 16 * 16, span = key_bytes(kind, padded);
    const float *value_scales = (const float *)(s->keys + 16 * padded) + 16;
    Floats highest[SEEN_QUERIES], sum[SEEN_QUERIES], whole[SEEN_QUERIES];
    EACH_QUERY {
        highest[g] = f_set(-INFINITY);
        sum[g] = f_zero();
    }
    for (t = start; t + 16 * spans <= end; t += 16 * spans) score(kind, queries, spans, s, q, t, scores + t - start, apart, highest);
    for (; t < end; t += 16) score(kind, queries, 1, s, q, t, scores + t - start, apart, highest);
    EACH_QUERY highest[g] = f_set(f_highest(highest[g]));
    for (t = start; t < end; t += 16)
        EACH_QUERY {
            float *at = scores + g * apart + t - start;
            Floats e = f_select(seen_from(&q[g], t), f_zero(), exponential(f_sub(f_load(at), highest[g])));
            sum[g] = f_add(sum[g], e);
            if (kind == INT8) e = f_mul(e, f_load(value_scales + t / 16 * (span / 4)));
            f_store(at, e);
        }
    EACH_QUERY whole[g] = f_set(1.0f / f_sum(sum[g]));
    scores += begin - start;
    for (i = 0; i + 16 * spans <= padded; i += 16 * spans) weigh(kind, queries, spans, s, q, begin, end, i, scores, apart, whole);
    for (; i < padded; i += 16) weigh(kind, queries, 1, s, q, begin, end, i, scores, apart, whole);
}

#define CASE(kind, n) case n: attend_few(kind, n, s, q, scores); break;
#define FOUR_CASES(kind) CASE(kind, 1) CASE(kind, 2) CASE(kind, 3) CASE(kind, 4)

static void attend_floats(const Seen *s, int queries, const SeenBy *q, float *scores) {
    switch (queries) { FOUR_CASES(FLOAT32) }
}

static void attend_bytes(const Seen *s, int queries, const SeenBy *q, float *scores) {
    switch (queries) { FOUR_CASES(INT8) }
}

static void attend_halves(const Seen *s, int queries, const SeenBy *q, float *scores) {
    switch (queries) {
        FOUR_CASES(FLOAT16)
        CASE(FLOAT16, 5)
        CASE(FLOAT16, 6)
#if SEEN_QUERIES == 12
        CASE(FLOAT16, 9)
        CASE(FLOAT16, 12)
#endif
    }
}
#undef FOUR_CASES
#undef CASE

/* Queries are taken in groups of sizes for which there is code. */
static void attend_seen(const Seen *s, int queries, const SeenBy *q, float *scores) {
    for (int some; queries; queries -= some, q += some) {
        int most = s->kind != FLOAT16 ? 4 : queries >= 12 ? 12 : queries >= 9 ? 9 : 6;
        some = queries < most ? queries : most;
        if (s->kind == INT8) attend_bytes(s, some, q, scores);
        else if (s->kind == FLOAT32) attend_floats(s, some, q, scores);
        else attend_halves(s, some, q, scores);
    }
}
