/* Encoders of BERT's kind, with a head that reads each text's first token (classifiers), or every token. */
#include <math.h>
#include <string.h>

#include "kernels.h"

#define LOCAL_ROWS 64 /* whose intermediate results fit the L2 cache together with a layer's weights */

/* Lay out ``h`` in ``memory`` (NULL to compute the size only). Returns the size in bytes. */
static int64_t lay_attention(Attention *h, const Stack *s, int n, char *memory) {
    int64_t keys = filled(n), size = s->head_size, bytes = 0;
#define LAY(field, count) h->field = (void *)(memory + bytes), bytes += filled(sizeof(*h->field) * (int64_t)(count))
    LAY(keys, keys * ((size + 3) / 4 * 4) + KEYS_AFTER);
    LAY(key_scale, keys);
    LAY(zeros, keys);
    LAY(key_offset, keys);
    LAY(values, (keys / 2) * padded_values(size));
    LAY(value_scale, padded_values(size));
    LAY(scores, TEXT_QUERIES * keys);
    LAY(shares, TEXT_QUERIES * keys);
    LAY(queries.quantized, TEXT_QUERIES * filled(size));
    LAY(queries.step, TEXT_QUERIES);
    h->layer = (Linear){h->keys, h->key_scale, h->key_offset, h->zeros, s->head_size, n, 0};
    h->most = log2f(fminf(32767.0f, (float)(INT32_MAX / MOST_VALUE / n)));
    h->n = n;
    return bytes;
}

int64_t attention_room(const Stack *s, int positions) {
    Attention h;
    return lay_attention(&h, s, positions, NULL);
}

static Attention attention_of(Context *c, int number, const Stack *s, int n) {
    Attention h;
    lay_attention(&h, s, n, (char *)c->scores[number]);
    memset(h.zeros, 0, sizeof(float) * filled(n));
    return h;
}

/* Attention of the rows ``first`` to ``last``, which are those of ``text`` and texts after it; results overwrite the queries.
 * A text's rows begin at its start plus ``shift``. */
static void attend_rows(Context *c, int number, const Stack *s, float *packed, int text, int first, int last, int shift) {
    int size = s->head_size, width = s->heads * size;
    int64_t wide = filled(3 * width);
    while (c->starts[text + 1] + shift <= first) text++;
    for (; text < c->texts && c->starts[text] + shift < last; text++) {
        int start = c->starts[text] + shift, n = c->starts[text + 1] - c->starts[text];
        int begin = first > start ? first : start, end = last < start + n ? last : start + n;
        Attention h = attention_of(c, number, s, n);
        for (int head = 0; head < s->heads; head++) {
            float *query = packed + head * size;
            const float *key = query + start * wide + width;
            c->kernels->take_head(&h, s, key, key + width, wide);
            for (int number = 0, most = c->kernels->queries; number < groups_of(end - begin, most); number++) {
                Group g = group(end - begin, most, 1, number);
                float *q = query + (begin + g.row) * wide;
                c->kernels->attend_head(&h, s, head, q, wide, begin + g.row - start, g.rows, q, wide);
            }
        }
    }
}

/* The rest of a layer after attention, for the rows ``first`` to ``last``, up to the input of ``next``. Intermediate results are
 * those of the rows from ``scratch`` on. */
static void finish_rows(Context *c, const Stack *s, const Layer *l, const Linear *next, const float *packed, int scratch,
                        int first, int last) {
    int64_t hidden = filled(s->hidden), wide = filled(3 * s->heads * s->head_size), inner = filled(l->up.out);
    Rows own = {c->given[1] + scratch * c->widest, c->quantized[1] + scratch * c->widest, c->step[1] + scratch};
    float *x = c->x + first * hidden, *middle = c->middle + scratch * inner;
    int rows = last - first;
    for (int r = 0; r < rows; r++) c->kernels->give_row(own, &l->out, r, packed + (first + r) * wide, 1.0f);
    linear_of(c, own, &l->out, rows, 0, (int)hidden / PANEL, (Then){.add = 1, .out = x});
    for (int r = 0; r < rows; r++) {
        c->kernels->normalize(&l->attention_norm, x + r * hidden, x + r * hidden, s->hidden);
        c->kernels->give_row(own, &l->up, r, x + r * hidden, 1.0f);
    }
    linear_of(c, own, &l->up, rows, 0, (int)inner / PANEL, (Then){.activation = s->activation, .out = middle});
    for (int r = 0; r < rows; r++) c->kernels->give_row(own, &l->down, r, middle + r * inner, 1.0f);
    linear_of(c, own, &l->down, rows, 0, (int)hidden / PANEL, (Then){.add = 1, .out = x});
    for (int r = 0; r < rows; r++) {
        c->kernels->normalize(&l->feed_forward_norm, x + r * hidden, x + r * hidden, s->hidden);
        c->kernels->give_row(buffer(c, 0), next, first + r, x + r * hidden, 1.0f);
    }
}

static void look_up(Context *c, const Stack *s, int row, int64_t token, int place) {
    float *x = c->x + (int64_t)row * filled(s->hidden);
    c->kernels->embed_row(s, token, s->positions + (int64_t)place * s->hidden, x);
    c->kernels->normalize(&s->embedding_norm, x, x, s->hidden);
    c->kernels->give_row(buffer(c, 0), &s->layer->qkv, row, x, 1.0f);
}

/* The last layer, computed only for each text's first token, and the classification head. Here threads split the panels,
 * not the rows. */
static void finish_texts(Context *c, int number, const Stack *s, float *packed) {
    const Layer *l = &s->layer[s->layers - 1];
    int size = s->head_size, width = s->heads * size, first, last, texts = c->texts;
    int64_t hidden = filled(s->hidden), wide = filled(3 * width), read = filled(l->qkv.in), given = filled(width);
    share(filled(width) / PANEL, c->threads, number, &first, &last);
    for (int text = 0; text < texts; text++) {
        int row = c->starts[text];
        Rows from = {c->given[0] + row * read, c->quantized[0] + row * read, c->step[0] + row};
        linear_of(c, from, &l->qkv, 1, first, last, (Then){.out = c->query + text * wide});
    }
    barrier(c);
    share(texts * s->heads, c->threads, number, &first, &last);
    for (int unit = first; unit < last; unit++) {
        int text = unit / s->heads, head = unit % s->heads, start = c->starts[text], n = c->starts[text + 1] - start;
        Attention h = attention_of(c, number, s, n);
        const float *key = packed + start * wide + width + head * size;
        c->kernels->take_head(&h, s, key, key + width, wide);
        c->kernels->attend_head(&h, s, head, c->query + text * wide + head * size, wide, 0, 1, c->given[0] + text * given + head * size,
                    given);
    }
    if (number == 0)
        for (int text = 1; text < texts; text++)
            memcpy(c->x + text * hidden, c->x + c->starts[text] * hidden, sizeof(float) * hidden);
    give_rows(c, number, 0, &l->out, texts);
    linear(c, number, 0, &l->out, texts, (Then){.add = 1, .out = c->x});
    barrier(c);
    between(c, number, s, &l->attention_norm, NULL, &l->up, texts, 1.0f);
    feed_forward(c, number, s, l, texts);
    between(c, number, s, &l->feed_forward_norm, NULL, &s->last, texts, 1.0f);
    linear(c, number, 0, &s->last, texts, (Then){.activation = c->head->activation, .out = c->given[1]});
    barrier(c);
    linear(c, number, 1, &c->head->out, texts, (Then){.out = c->middle});
    barrier(c);
    if (number == 0)
        for (int text = 0, labels = c->head->out.out; text < texts; text++)
            memcpy(c->logits + (int64_t)text * labels, c->middle + (int64_t)text * filled(labels), sizeof(float) * labels);
}

/* The head of every token, for the rows ``first`` to ``last``. */
static void finish_tokens(Context *c, const Stack *s, int first, int last, int shift) {
    int64_t read = filled(s->hidden), wide = filled(s->last.out), labels = s->last.out;
    Rows from = {c->given[0] + first * read, c->quantized[0] + first * read, c->step[0] + first};
    float *out = c->given[1] + first * c->widest; /* these rows' own */
    linear_of(c, from, &s->last, last - first, 0, (int)wide / PANEL, (Then){.out = out});
    for (int row = first; row < last; row++)
        memcpy(c->logits + (row - shift) * labels, out + (row - first) * wide, sizeof(float) * labels);
}

/* Compute the rows ``first`` to ``last``; their texts are as in attend_rows. Threads that have rows ``together`` wait for the
 * others' keys and values before attention. */
static void encode_rows(Context *c, int number, int text, int first, int last, int shift, int together) {
    const Stack *s = c->encoder;
    int width = s->heads * s->head_size, panels = filled(3 * width) / PANEL, tokens = !c->head->out.weight;
    int64_t wide = filled(3 * width), read = filled(s->hidden);
    for (int row = first; row < last; row++) look_up(c, s, row, c->ids[row - shift], c->places[row - shift]);
    for (int i = 0; i < s->layers; i++) {
        int end = i == s->layers - 1, first_only = end && !tokens;
        float *packed = c->packed + (i % 2) * c->capacity * wide; /* other threads may still read the previous layer's */
        Rows from = {c->given[0] + first * read, c->quantized[0] + first * read, c->step[0] + first};
        linear_of(c, from, &s->layer[i].qkv, last - first, first_only ? width / PANEL : 0, panels, (Then){.out = packed + first * wide});
        if (together) barrier(c);
        if (first_only) finish_texts(c, number, s, packed);
        else if (first < last) {
            attend_rows(c, number, s, packed, text, first, last, shift);
            for (int row = first; row < last; row += LOCAL_ROWS)
                finish_rows(c, s, &s->layer[i], end ? &s->last : &s->layer[i + 1].qkv, packed, first, row,
                            row + LOCAL_ROWS < last ? row + LOCAL_ROWS : last);
        }
    }
    if (tokens && first < last) finish_tokens(c, s, first, last, shift);
}

/* Take the next texts, of up to TOKENS_PER_THREAD tokens (or one longer text). Returns the one after the last. */
static int take_texts(Context *c, int *first) {
    pthread_mutex_lock(&c->mutex);
    int last = *first = c->next;
    while (last < c->texts && (last == *first || c->starts[last + 1] - c->starts[*first] <= TOKENS_PER_THREAD)) last++;
    c->next = last;
    pthread_mutex_unlock(&c->mutex);
    return last;
}

/* Threads split the rows. If there are many rows, each thread takes whole texts, so that no thread waits for another. */
void classify(Context *c, int number) {
    int first, last;
    if (!c->apart) {
        share(c->rows, c->threads, number, &first, &last);
        encode_rows(c, number, 0, first, last, 0, 1);
        return;
    }
    while ((last = take_texts(c, &first)) > first) {
        int begin = c->apart * number, start = c->starts[first];
        encode_rows(c, number, first, begin, begin + c->starts[last] - start, begin - start, 0);
    }
}
