/* The encoder of a translator: attention within each text, and keys and values for the decoder's cross-attention. */
#include "kernels.h"

/* A head of a text attends to the whole text. */
void encoder_attention(Context *c, int number, const Stack *s, int layer) {
    const Linear *next = &s->layer[layer].out;
    int size = s->head_size, width = s->heads * size, units = c->texts * s->heads;
    int64_t wide = filled(3 * width), out_wide = filled(next->in);
    for (int unit = number; unit < units; unit += c->threads) {
        int text = unit / s->heads, head = unit % s->heads, start = c->starts[text];
        const float *query = c->packed + start * wide + head * size;
        c->kernels->attend_text(s, &(TextHead){
            .query = query,
            .key = query + width,
            .value = query + 2 * width,
            .bias = s->bias ? s->bias + (int64_t)head * s->distances : NULL,
            .wide = wide,
            .out_wide = out_wide,
            .out = c->given[0] + start * out_wide + head * size,
            .scratch = c->scores[number],
            .n = c->starts[text + 1] - start,
        });
    }
    give_rows(c, number, 0, next, c->rows);
}

void encode(Context *c, int number) {
    const Linear *l = &c->encoder->last;
    int first, last, rows = c->rows, text = 0;
    share(rows, c->threads, number, &first, &last);
    for (int row = first; row < last; row++) {
        while (c->starts[text + 1] <= row) text++;
        embed(c, c->encoder, row, c->ids[row], row - c->starts[text]);
    }
    layers(c, number, c->encoder);
    linear(c, number, 0, l, rows, (Then){.out = c->middle});
    barrier(c);
    const Stack *d = c->decoder;
    int heads = d->heads * 2 * d->layers, padded = padded_head(d->head_size);
    int64_t wide = filled(l->out);
    share(heads, c->threads, number, &first, &last); /* split by head: tokens of a head share bytes that are written together */
    for (int h = first; h < last; h++)
        for (int row = 0, t = 0; row < rows; row++) {
            while (c->starts[t + 1] <= row) t++;
            int at = row - c->starts[t], room = (c->starts[t + 1] - c->starts[t] + 15) / 16 * 16;
            float *scales = (float *)(c->cross[t] + (int64_t)heads * room * padded);
            int64_t to = (int64_t)h * room;
            scales[to + at] = c->kernels->keep(c->middle + row * wide + h * d->head_size, c->cross[t] + to * padded, d->head_size, at,
                                   h / d->heads % 2);
        }
}
