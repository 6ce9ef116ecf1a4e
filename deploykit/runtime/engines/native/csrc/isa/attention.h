/* Attention of translators: the decoder's over cached keys and values, and the encoder's within a text.
 * docs/add-an-engine.md says why there are four attentions. */
#pragma once

#define EACH_HEAD _Pragma("GCC unroll 4") for (int g = 0; g < heads; g++) /* unrolled, so that sums stay in registers */

static void softmax(float *scores, int n) {
    Floats highest = f_set(-INFINITY), sum = f_zero();
    for (int i = 0; i < n; i += 16) highest = f_max(highest, f_load_or(scores + i, n - i, -INFINITY));
    highest = f_set(f_highest(highest));
    for (int i = 0; i < n; i += 16) {
        Floats e = f_first(exponential(f_sub(f_load(scores + i), highest)), n - i);
        f_store(scores + i, e);
        sum = f_add(sum, e);
    }
    Floats whole = f_set(1.0f / f_sum(sum));
    for (int i = 0; i < n; i += 16) f_store(scores + i, f_mul(f_load(scores + i), whole));
}

/* The biases of 16 distances from ``first`` on. */
INLINE Floats biases(const Stack *s, const float *bias, int first) {
    float ends[16];
    first += s->zero_distance;
    if (first >= 0 && first + 16 <= s->distances) return f_load(bias + first);
    for (int i = 0; i < 16; i++) {
        int d = first + i;
        ends[i] = bias[d < 0 ? 0 : d >= s->distances ? s->distances - 1 : d];
    }
    return f_load(ends);
}

static float keep(const float *x, int8_t *block, int size, int position, int is_value) {
    int padded = padded_head(size);
    float highest = largest_of(x, size);
    Floats inverse = f_set(highest > 0 ? 127.0f / highest : 0.0f);
    for (int i = 0; i < padded; i += 16) {
        Ints v = i_round(f_mul(f_load_some(x + i, size - i), inverse));
        if (is_value) {
            i_put_every_fourth_byte(block + (position / 4 * 4) * padded + 4 * i, v, position % 4);
        } else {
            int32_t fours[4];
            i_put_bytes(fours, i_add(v, i_set(128)));
            for (int j = 0; j < 4; j++)
                memcpy(block + (position / 16 * 16) * padded + 16 * i + 64 * j + position % 16 * 4, &fours[j], 4);
        }
    }
    return highest / 127.0f;
}

INLINE void attend_heads(const int heads, float *scratch, const Stack *s, const float *query, const Kept *keys,
                         const Kept *values, const Places *places, const float *bias, float *out) {
    const int32_t *table = places->table;
    int64_t stride = places->stride;
    int size = s->head_size, padded = padded_head(size), parts = padded / 16, n = places->n, room = (n + 15) / 16 * 16;
    float *scores = scratch, *worths = scores + MOST_HEADS * room;
    uint8_t *p = (uint8_t *)(worths + MOST_HEADS * room);
    Query q[MOST_HEADS];
    float worth[MOST_HEADS], offset[MOST_HEADS];
    Floats most[MOST_HEADS], highest[MOST_HEADS], sum[MOST_HEADS];
    EACH_HEAD {
        const float *x = query + g * size;
        float largest = largest_of(x, size);
        Floats inverse = f_set(largest > 0 ? 32639.0f / largest : 0.0f); /* 127 x 256 + 127 */
        Ints total = i_zero();
        for (int i = 0; i < padded; i += 16) {
            Ints v = i_round(f_mul(f_load_some(x + i, size - i), inverse));
            put_query(&q[g], i, v);
            total = i_add(total, v);
        }
        offset[g] = 128.0f * (float)i_sum(total);
        worth[g] = largest / 32639.0f * s->scale;
        most[g] = sum[g] = f_zero();
        highest[g] = f_set(-INFINITY);
    }
    for (int t = 0; t < n; t += 16) {
        Floats score[MOST_HEADS], value[MOST_HEADS];
        EACH_HEAD {
            score[g] = f_set(-INFINITY);
            value[g] = f_zero();
        }
        EACH_SLOT(t) {
            Floats product[MOST_HEADS];
            key_products(heads, q, keys->bytes + from * padded, keys->apart * padded, padded, values->bytes + from * padded,
                         values->apart * padded, product);
            EACH_HEAD {
                int64_t key = g * keys->apart + from, its_value = g * values->apart + from;
                Floats of_slot = f_mul(f_sub(product[g], f_set(offset[g])), f_mul(f_set(worth[g]), f_load(keys->scale + key)));
                score[g] = f_select(its, score[g], of_slot);
                value[g] = f_select(its, value[g], f_load(values->scale + its_value));
            }
        }
        EACH_HEAD {
            if (bias) score[g] = f_add(score[g], biases(s, bias + (int64_t)g * s->distances, t - (n - 1)));
            f_store(scores + g * room + t, score[g]);
            f_store(worths + g * room + t, value[g]);
            highest[g] = f_max(highest[g], score[g]);
            most[g] = f_max(most[g], value[g]);
        }
    }
    Floats inverse[MOST_HEADS];
    EACH_HEAD {
        float largest = f_highest(most[g]);
        highest[g] = f_set(f_highest(highest[g]));
        inverse[g] = f_set(largest > 0 ? 65535.0f / largest : 0.0f);
        worth[g] = largest;
    }
    for (int t = 0; t < n; t += 16) /* a value's count is its unnormalized probability times its scale */
        EACH_HEAD {
            Floats e = f_first(exponential(f_sub(f_load(scores + g * room + t), highest[g])), n - t);
            sum[g] = f_add(sum[g], e);
            put_counts(p + COUNT_BYTES * (g * room + t), i_round(f_mul(e, f_mul(inverse[g], f_load(worths + g * room + t)))));
        }
    EACH_HEAD worth[g] = worth[g] / (65535.0f * f_sum(sum[g]));
    EACH_HEAD
        for (int first = 0; first < parts; first += 4) {
            const int8_t *v = values->bytes + g * values->apart * padded + 64 * first;
            float *to = out + g * size + 16 * first;
            switch (parts - first) {
#define PARTS(some) gather(some, p + COUNT_BYTES * g * room, v, padded, table, stride, n, worth[g], to, size - 16 * first); break
            case 1: PARTS(1);
            case 2: PARTS(2);
            case 3: PARTS(3);
            default: PARTS(4);
#undef PARTS
            }
        }
}

static void attend(int heads, float *scratch, const Stack *s, const float *query, const Kept *keys, const Kept *values,
                   const Places *places, const float *bias, float *out) {
    switch (heads) {
    case 1: attend_heads(1, scratch, s, query, keys, values, places, bias, out); break;
    case 2: attend_heads(2, scratch, s, query, keys, values, places, bias, out); break;
    case 3: attend_heads(3, scratch, s, query, keys, values, places, bias, out); break;
    default: attend_heads(4, scratch, s, query, keys, values, places, bias, out);
    }
}

static void attend_text(const Stack *s, const TextHead *h) {
    int size = s->head_size, padded = padded_head(size), n = h->n, room = (n + 15) / 16 * 16;
    float *scores = h->scratch, *keys = scores + QUERIES * room; /* [room / 16][padded][16] */
    for (int t = 0; t < n; t += 16)
        for (int i = 0; i < padded; i += 16) {
            Floats x[16];
            for (int j = 0; j < 16; j++) x[j] = t + j < n ? f_load_some(h->key + (t + j) * h->wide + i, size - i) : f_zero();
            f_transpose(x);
            for (int j = 0; j < 16; j++) f_store(keys + t * padded + (i + j) * 16, x[j]);
        }
    for (int i = 0; i < n; i += QUERIES) {
        int at[QUERIES]; /* repeat the last token if there are fewer */
        const float *q[QUERIES];
        for (int a = 0; a < QUERIES; a++) {
            at[a] = i + a < n ? i + a : n - 1;
            q[a] = h->query + at[a] * h->wide;
        }
        for (int t = 0; t < n; t += 16) {
            Floats sum[QUERIES] = {f_zero(), f_zero(), f_zero(), f_zero()};
            for (int k = 0; k < size; k++) {
                Floats x = f_load(keys + t * padded + k * 16);
                for (int a = 0; a < QUERIES; a++) sum[a] = f_fma(f_set(q[a][k]), x, sum[a]);
            }
            for (int a = 0; a < QUERIES; a++) {
                Floats score = f_mul(sum[a], f_set(s->scale));
                if (h->bias) score = f_add(score, biases(s, h->bias, t - at[a]));
                f_store(scores + a * room + t, score);
            }
        }
        for (int a = 0; a < QUERIES; a++) softmax(scores + a * room, n);
        for (int k = 0; k < size; k += 16) {
            Floats sum[QUERIES] = {f_zero(), f_zero(), f_zero(), f_zero()};
            for (int j = 0; j < n; j++) {
                Floats v = f_load_some(h->value + j * h->wide + k, size - k);
                for (int a = 0; a < QUERIES; a++) sum[a] = f_fma(f_set(scores[a * room + j]), v, sum[a]);
            }
            for (int a = 0; a < QUERIES; a++) f_store_some(h->out + at[a] * h->out_wide + k, sum[a], size - k);
        }
    }
}
