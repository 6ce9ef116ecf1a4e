/* The decoder of a translator: its two attentions, and one step. */
#include <time.h>

#include "kernels.h"

/* Return how many heads of ``unit``'s row, from its own on, are computed together. */
INLINE int together(const Stack *s, int unit, int last) {
    int left = s->heads - unit % s->heads;
    if (left > last - unit) left = last - unit;
    return left < MOST_HEADS ? left : MOST_HEADS;
}

void self_attention(Context *c, int number, const Stack *s, int layer) {
    const Batch *b = c->batch;
    const Linear *next = &s->layer[layer].out;
    int first, last, size = s->head_size, width = s->heads * size, wide = filled(3 * width), padded = padded_head(size);
    int64_t stride = (int64_t)s->heads * b->cache_positions, all = b->cache_slots * stride;
    share(b->rows * s->heads, c->threads, number, &first, &last);
    for (int unit = first, heads; unit < last; unit += heads) {
        int row = unit / s->heads, head = unit % s->heads, past = b->past[row];
        const float *packed = c->packed + (int64_t)row * wide + head * size;
        int64_t keys = 2 * layer * all + (int64_t)head * b->cache_positions, values = keys + all;
        heads = together(s, unit, last);
        for (int is_value = 0; is_value < 2; is_value++)
            for (int g = 0; g < heads; g++) {
                int64_t to = (is_value ? values : keys) + b->slots[row] * stride + (int64_t)g * b->cache_positions;
                b->cache_scale[to + past] =
                    c->kernels->keep(packed + (1 + is_value) * width + g * size, b->cache + to * padded, size, past, is_value);
            }
        c->kernels->attend(heads, c->scores[number], s, packed,
                           &(Kept){b->cache + keys * padded, b->cache_scale + keys, b->cache_positions},
                           &(Kept){b->cache + values * padded, b->cache_scale + values, b->cache_positions},
                           &(Places){b->tables + (int64_t)row * b->table, stride, past + 1},
                           s->bias ? s->bias + (int64_t)head * s->distances : NULL,
                           c->given[0] + (int64_t)row * filled(next->in) + head * size);
    }
    give_rows(c, number, 0, next, b->rows);
}

/* Layout of a text's cross-attention: int8 [layers][key, value][head], tokens padded to 16, then the float32 scales. */
void cross_attention(Context *c, int number, const Stack *s, int layer) {
    const Batch *b = c->batch;
    const Linear *next = &s->layer[layer].cross_out;
    int first, last, size = s->head_size, wide = filled(s->heads * size), padded = padded_head(size);
    share(b->rows * s->heads, c->threads, number, &first, &last);
    for (int unit = first, heads; unit < last; unit += heads) {
        int row = unit / s->heads, head = unit % s->heads, n = b->source[row], room = (n + 15) / 16 * 16;
        int64_t all = (int64_t)s->layers * 2 * s->heads * room, keys = ((int64_t)layer * 2 * s->heads + head) * room;
        int64_t values = keys + (int64_t)s->heads * room;
        const int8_t *cross = b->cross[row];
        const float *scales = (const float *)(cross + all * padded);
        heads = together(s, unit, last);
        c->kernels->attend(heads, c->scores[number], s, c->query + (int64_t)row * wide + head * size,
                           &(Kept){cross + keys * padded, scales + keys, room},
                           &(Kept){cross + values * padded, scales + values, room}, &(Places){NULL, 0, n}, NULL,
                           c->given[0] + (int64_t)row * filled(next->in) + head * size);
    }
    give_rows(c, number, 0, next, b->rows);
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

void step(Context *c, int number) {
    int64_t began = now(), chose;
    const Batch *b = c->batch;
    int first, last;
    share(c->rows, c->threads, number, &first, &last);
    for (int row = first; row < last; row++) {
        b->tables[(int64_t)row * b->table + b->past[row]] = b->slots[row];
        embed(c, c->decoder, row, b->tokens[row], b->past[row]);
    }
    layers(c, number, c->decoder);
    chose = now();
    choose(c, number, c->decoder);
    if (number == 0) {
        c->stepping += now() - began;
        c->choosing += now() - chose;
    }
}
