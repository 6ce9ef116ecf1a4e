/* Attention of classifiers, within a text, in INT8 and INT16. */
#pragma once

/* Quantize a head's keys to panels, as a layer's weights. */
INLINE void take_keys(Attention *h, int size, const float *key, int64_t wide) {
    int quads = (size + 3) / 4, n = h->n;
    int32_t *panels = (int32_t *)h->keys, four[64] = {0};
    for (int j = 0; j < filled(n); j++) {
        const float *k = key + j * wide;
        if (j < n) {
            Ints sum = i_zero();
            float highest = largest_of(k, size);
            Floats inverse = f_set(highest > 0 ? 127.0f / highest : 0.0f);
            for (int i = 0; i < size; i += 16) {
                Ints x = i_round(f_mul(f_load_some(k + i, size - i), inverse));
                sum = i_add(sum, x);
                i_put_bytes((int8_t *)four + i, x);
            }
            h->key_scale[j] = highest / 127.0f;
            h->key_offset[j] = 128 * i_sum(sum);
            for (int i = 0; i < quads; i++) panels[((int64_t)(j / PANEL) * quads + i) * PANEL + j % PANEL] = four[i];
        } else { /* scores of such keys are not read */
            h->key_scale[j] = 0.0f;
            h->key_offset[j] = 0;
        }
    }
}

/* Set the scale of 16 values of a head, from ``i`` on. Returns what they are multiplied by. */
INLINE Floats take_value_scale(Attention *h, int size, int i, const float *value, int64_t wide) {
    Floats most = f_zero();
    for (int j = 0; j < h->n; j++) most = f_max(most, f_abs(f_load_some(value + j * wide + i, size - i)));
    f_store(h->value_scale + i, f_div(most, f_set(MOST_VALUE)));
    return f_where_positive(most, f_div(f_set(MOST_VALUE), most));
}

static void take_head(Attention *h, const Stack *s, const float *key, const float *value, int64_t wide) {
    int size = s->head_size, padded = padded_values(size), n = h->n;
    take_keys(h, size, key, wide);
    for (int i = 0; i < padded; i += 16) {
        Floats inverse = take_value_scale(h, size, i, value, wide);
        for (int j = 0; j < n; j += 2) {
            Ints a = i_round(f_mul(f_load_some(value + j * wide + i, size - i), inverse)), b = i_zero();
            if (j + 1 < n) b = i_round(f_mul(f_load_some(value + (j + 1) * wide + i, size - i), inverse));
            i_store(h->values + (int64_t)(j / 2) * padded + i, i_pair(a, b));
        }
    }
}

/* Convert ``scores``, exponents of 2, to shares of at most 2^``most``. Returns their sum. */
INLINE int take_shares(float *scores, int16_t *shares, int n, float most) {
    Floats highest = f_set(-INFINITY);
    Ints sum = i_zero();
    for (int i = 0; i < n; i += 16) highest = f_max(highest, f_load_or(scores + i, n - i, -INFINITY));
    highest = f_set(f_highest(highest) - most);
    for (int i = n; i < (n + 15) / 16 * 16; i++) scores[i] = -1e9f;
    for (int i = 0; i < n; i += 16) {
        Ints counts = i_round(power_of_two(f_sub(f_load(scores + i), highest)));
        sum = i_add(sum, counts);
        i_put_shorts(shares + i, counts);
    }
    return i_sum(sum);
}

static void attend_head(Attention *h, const Stack *s, int head, const float *query, int64_t wide, int from, int rows,
                        float *out, int64_t out_wide) {
    int size = s->head_size, padded = padded_values(size), n = h->n;
    int64_t keys = filled(n), pairs = (n + 1) / 2;
    const float *bias = s->bias ? s->bias + (int64_t)head * s->distances : NULL;
    float sums[MOST_ROWS];
    for (int r = 0; r < rows; r++) give_row(h->queries, &h->layer, r, query + r * wide, s->scale * 1.44269504f);
    for (int panel = 0; panel < keys / PANEL; panel++)
        tile(h->queries, &h->layer, group(rows, MOST_ROWS, 1, 0), panel, (Then){.out = h->scores + panel * PANEL}, keys);
    for (int r = 0; r < rows; r++) {
        float *scores = h->scores + r * keys;
        for (int t = 0; bias && t < n; t += 16)
            f_store(scores + t, f_fma(biases(s, bias, t - (from + r)), f_set(1.44269504f), f_load(scores + t)));
        sums[r] = 1.0f / (float)take_shares(scores, h->shares + r * keys, n, h->most);
    }
    for (int i = 0; i < padded; i += 32) {
        Ints sum[MOST_ROWS][2];
        value_sums(rows, h->shares, keys, h->values + i, padded, pairs, sum);
        for (int r = 0; r < rows; r++)
            for (int at = i; at < i + 32 && at < size; at += 16) {
                Floats worth = f_mul(f_load(h->value_scale + at), f_set(sums[r]));
                f_store_some(out + r * out_wide + at, f_mul(f_from(sum[r][(at - i) / 16]), worth), size - at);
            }
    }
}
