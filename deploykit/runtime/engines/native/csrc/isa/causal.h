/* Kernels of language models: rounding of rows, products, and attention over float16 caches. */

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

static void multiply(const Given *from, const Matrix *m, int row, int rows, int panel, int add, float *out, int64_t stride,
                     Ahead ahead) {
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

/* Set a panel of ``x`` to its activation, or with a ``gate`` to activation(gate) * x. */
static void pass_gate(int activation, const float *gate, float *x, int rows, int64_t stride) {
    for (; rows--; x += stride) {
        if (gate) {
            f_store(x, f_mul(activated(activation, f_load(gate)), f_load(x)));
            gate += COLUMNS;
        } else {
            f_store(x, activated(activation, f_load(x)));
        }
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

INLINE void attend_few(const int heads, const Seen *s, const float *query, float *scores, float *out) {
    int size = s->size, padded = padded_head(size), begin = s->first / 16 * 16, n = s->n;
    int64_t apart = (n - begin + 15) / 16 * 16;
    Floats highest[MOST_HEADS], sum[MOST_HEADS];
    EACH_HEAD {
        highest[g] = f_set(-INFINITY);
        sum[g] = f_zero();
    }
    for (int t = begin; t < n; t += 16) {
        const uint16_t *keys = s->keys + (int64_t)t * padded;
        uint32_t seen = tail(n - t) & ~tail(s->first - t);
        Floats score[MOST_HEADS];
        EACH_HEAD score[g] = f_zero();
        for (int i = 0; i < size; i++, keys += 16) {
            Floats key = f_load_halves(keys);
            EACH_HEAD score[g] = f_fma(key, f_set(query[g * size + i]), score[g]);
        }
        EACH_HEAD {
            score[g] = f_mul(score[g], f_set(s->scale));
            if (s->cap > 0.0f) score[g] = capped(score[g], s->cap);
            score[g] = f_select(seen, f_set(-INFINITY), score[g]);
            highest[g] = f_max(highest[g], score[g]);
            f_store(scores + g * apart + t - begin, score[g]);
        }
    }
    EACH_HEAD highest[g] = f_set(f_highest(highest[g]));
    for (int t = begin; t < n; t += 16) {
        uint32_t seen = tail(n - t) & ~tail(s->first - t);
        EACH_HEAD {
            float *at = scores + g * apart + t - begin;
            Floats e = f_select(seen, f_zero(), exponential(f_sub(f_load(at), highest[g])));
            f_store(at, e);
            sum[g] = f_add(sum[g], e);
        }
    }
    Floats whole[MOST_HEADS];
    EACH_HEAD whole[g] = f_set(1.0f / f_sum(sum[g]));
    for (int i = 0; i < padded; i += 16) {
        const uint16_t *values = s->values + (int64_t)s->first * padded + i;
        EACH_HEAD sum[g] = f_zero();
        for (int t = s->first; t < n; t++, values += padded) {
            Floats value = f_load_halves(values);
            EACH_HEAD sum[g] = f_fma(value, f_set(scores[g * apart + t - begin]), sum[g]);
        }
        EACH_HEAD f_store_some(out + g * size + i, f_mul(sum[g], whole[g]), size - i);
    }
}

static void attend_seen(const Seen *s, int heads, const float *query, float *scores, float *out) {
    switch (heads) {
    case 1: attend_few(1, s, query, scores, out); break;
    case 2: attend_few(2, s, query, scores, out); break;
    case 3: attend_few(3, s, query, scores, out); break;
    default: attend_few(4, s, query, scores, out);
    }
}
