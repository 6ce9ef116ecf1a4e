/* Attention of classifiers by AMX, for 16 queries at once. The 16 bits of shares and values are split into bytes. Texts of
 * fewer than LEAST_KEYS tokens are faster without. */
#pragma once
#include "attention.h"
#include "text_attention.h"

#define LEAST_KEYS 192
#define BLOCK_KEYS 64 /* of a product of shares and values */

/* Return 16 vectors' low bytes, and their second bytes: of ``a``, ``c``, ``b`` and ``d`` by turns, which is how shares and
 * values of a block's keys are ordered. */
INLINE Ints low_bytes(Ints a, Ints b, Ints c, Ints d) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x00ff00ff), i_pair(a, b), _mm512_slli_epi32(i_pair(c, d), 8), 0xca);
}
INLINE Ints high_bytes(Ints a, Ints b, Ints c, Ints d) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x00ff00ff), _mm512_srli_epi32(i_pair(a, b), 8), i_pair(c, d), 0xca);
}

/* Of each value, ``h->values`` has the signed high bytes, [keys / 64][16][head size][4], and then the signed low bytes. */
static void take_text_head(Attention *h, const Stack *s, const float *key, const float *value, int64_t wide) {
    int size = s->head_size, padded = padded_values(size), n = h->n;
    int8_t *high = (int8_t *)h->values, *low = high + filled(n) * padded;
    if (n < LEAST_KEYS) {
        take_head(h, s, key, value, wide);
        return;
    }
    take_keys(h, size, key, wide);
    for (int i = 0; i < padded; i += 16) {
        Floats inverse = take_value_scale(h, size, i, value, wide);
        for (int j = 0; j < filled(n); j += BLOCK_KEYS)
            for (int k = j; k < j + 16; k++) {
                Ints v[4], up[4];
                for (int quarter = 0; quarter < 4; quarter++) {
                    int at = k + 16 * quarter;
                    v[quarter] = at < n ? i_round(f_mul(f_load_some(value + at * wide + i, size - i), inverse)) : i_zero();
                    up[quarter] = i_add(v[quarter], i_set(128)); /* because low bytes are signed */
                }
                int64_t to = ((int64_t)(j / 4 + k - j) * padded + i) * 4;
                _mm512_store_si512(high + to, high_bytes(up[0], up[1], up[2], up[3]));
                _mm512_store_si512(low + to, low_bytes(v[0], v[1], v[2], v[3]));
            }
    }
}

/* Multiply 16 queries by all keys. After the last input, zeros are multiplied by other bytes. */
INLINE void key_sums(const Attention *h, int size, int32_t *sums) {
    int quads = (size + 3) / 4, keys = filled(h->n);
    settle();
    for (int panel = 0; panel < keys / PANEL; panel++) {
        Panel p = {h->keys + (int64_t)panel * quads * 4 * PANEL, NULL, NULL, (size + STEP - 1) / STEP, 0};
        one_by_four(1, h->queries.quantized, filled(size), &p, sums + panel * PANEL, 4 * keys);
    }
}

/* Replace a query's sums by scores, exponents of 2. Returns the highest. */
INLINE float take_scores(const Attention *h, const Stack *s, const float *bias, int position, float step, float *scores) {
    Floats most = f_set(-INFINITY);
    int n = h->n, keys = filled(n);
    for (int t = 0; t < n; t += 16) {
        Floats v = f_fma(f_from(_mm512_load_si512(scores + t)), f_mul(f_load(h->key_scale + t), f_set(step)), f_zero());
        if (bias) v = f_fma(biases(s, bias, t - position), f_set(1.44269504f), v);
        most = f_max(most, n - t < 16 ? f_select(tail(n - t), f_set(-INFINITY), v) : v);
        f_store(scores + t, v);
    }
    for (int t = n / 16 * 16; t < keys; t += 16) f_store(scores + t, f_select(tail(n - t), f_set(-1e9f), f_load(scores + t)));
    return f_highest(most);
}

/* Convert a query's scores to the bytes of shares. Returns their sum. */
INLINE int take_share_bytes(const float *scores, int keys, float highest, uint8_t *high, uint8_t *low) {
    Ints sum = i_zero();
    for (int t = 0; t < keys; t += BLOCK_KEYS) {
        Ints p[4];
        for (int quarter = 0; quarter < 4; quarter++) {
            p[quarter] = i_round(power_of_two(f_sub(f_load(scores + t + 16 * quarter), f_set(highest))));
            sum = i_add(sum, p[quarter]);
        }
        _mm512_store_si512(high + t, high_bytes(p[0], p[1], p[2], p[3]));
        _mm512_store_si512(low + t, low_bytes(p[0], p[1], p[2], p[3]));
    }
    return i_sum(sum);
}

/* Multiply the shares of 16 queries by 16 values, whose high and low bytes are ``padded`` apart. */
INLINE void value_sums_of_bytes(const uint8_t *high, const uint8_t *low, int keys, const int8_t *high_values,
                                const int8_t *low_values, int padded, int32_t *sums) {
    settle();
    clear_sums();
    for (int t = 0; t < keys; t += BLOCK_KEYS) {
        _tile_loadd(4, high + t, keys);
        _tile_loadd(5, high_values + t * padded, 4 * padded);
        _tile_loadd(6, low_values + t * padded, 4 * padded);
        _tile_loadd(7, low + t, keys);
        _tile_dpbusd(0, 4, 5);
        _tile_dpbusd(1, 4, 6);
        _tile_dpbusd(2, 7, 5);
        _tile_dpbusd(3, 7, 6);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

static void attend_text_head(Attention *h, const Stack *s, int head, const float *query, int64_t wide, int from, int rows,
                             float *out, int64_t out_wide) {
    if (h->n < LEAST_KEYS) {
        for (int number = 0; number < groups_of(rows, MOST_ROWS); number++) {
            Group g = group(rows, MOST_ROWS, 1, number);
            attend_head(h, s, head, query + g.row * wide, wide, from + g.row, g.rows, out + g.row * out_wide, out_wide);
        }
        return;
    }
    int size = s->head_size, padded = padded_values(size), keys = filled(h->n), in = filled(size);
    const float *bias = s->bias ? s->bias + (int64_t)head * s->distances : NULL;
    uint8_t *high = (uint8_t *)h->shares, *low = high + TEXT_QUERIES * keys;
    const int8_t *high_values = (const int8_t *)h->values, *low_values = high_values + keys * padded;
    float highest[TEXT_QUERIES], inverse[TEXT_QUERIES];
    _Alignas(64) int32_t sums[4 * 256];
    for (int r = 0; r < rows; r++) {
        give_row(h->queries, &h->layer, r, query + r * wide, s->scale * 1.44269504f);
        for (uint8_t *q = h->queries.quantized + r * in, *end = q + in; q < end; q += 64) /* signed again */
            _mm512_store_si512(q, _mm512_xor_si512(_mm512_load_si512(q), _mm512_set1_epi8((char)ZERO)));
    }
    configure(16);
    key_sums(h, size, (int32_t *)h->scores);
    for (int r = 0; r < rows; r++)
        highest[r] = take_scores(h, s, bias, from + r, h->queries.step[r], h->scores + r * keys) - h->most;
    for (int r = 0; r < rows; r++)
        inverse[r] = 1.0f / (float)take_share_bytes(h->scores + r * keys, keys, highest[r], high + r * keys, low + r * keys);
    for (int i = 0; i < size; i += 16) {
        value_sums_of_bytes(high, low, keys, high_values + 4 * i, low_values + 4 * i, padded, sums);
        for (int r = 0; r < rows; r++) {
            const int32_t *at = sums + 16 * r;
            Ints middle = i_add(_mm512_load_si512(at + 256), _mm512_load_si512(at + 512));
            Ints upper = i_add(_mm512_slli_epi32(_mm512_load_si512(at), 16), _mm512_slli_epi32(middle, 8));
            Floats sum = f_from(i_add(upper, _mm512_load_si512(at + 768)));
            f_store_some(out + r * out_wide + i, f_mul(sum, f_mul(f_load(h->value_scale + i), f_set(inverse[r]))), size - i);
        }
    }
}
