/* The layers of encoders and decoders of translators, and the feed-forward block of all models. */
#include "kernels.h"

void feed_forward(Context *c, int number, const Stack *s, const Layer *l, int rows) {
    if (l->gate.weight) {
        linear(c, number, 0, &l->gate, rows, (Then){.activation = s->activation, .out = c->middle});
        linear(c, number, 0, &l->up, rows, (Then){.factor = c->middle, .out = c->given[1]});
    } else {
        linear(c, number, 0, &l->up, rows, (Then){.activation = s->activation, .out = c->given[1]});
    }
    give_rows(c, number, 1, &l->down, rows);
    linear(c, number, 1, &l->down, rows, (Then){.add = 1, .out = c->x});
    barrier(c);
}

/* After a block, compute each row's norm (this block's or the next one's) and the next layer's input. */
void between(Context *c, int number, const Stack *s, const Norm *after, const Norm *before_next, const Linear *next,
             int rows, float scale) {
    int first, last, wide = filled(s->hidden);
    share(rows, c->threads, number, &first, &last);
    for (int row = first; row < last; row++) {
        float *x = c->x + (int64_t)row * wide, *given = x;
        if (!s->pre_norm && after) c->kernels->normalize(after, x, x, s->hidden);
        if (before_next && before_next->gamma) {
            given = s->pre_norm ? c->normed + (int64_t)row * wide : x;
            c->kernels->normalize(before_next, x, given, s->hidden);
        }
        c->kernels->give_row(buffer(c, 0), next, row, given, scale);
    }
    barrier(c);
}

void embed(Context *c, const Stack *s, int row, int64_t token, int position) {
    float *x = c->x + (int64_t)row * filled(s->hidden);
    c->kernels->embed_column(s, token, s->positions ? s->positions + (int64_t)position * s->hidden : NULL, x);
    if (s->embedding_norm.gamma) c->kernels->normalize(&s->embedding_norm, x, x, s->hidden);
}

/* Compute all layers from the embedding on; ``x`` becomes the input of the last linear layer. */
void layers(Context *c, int number, const Stack *s) {
    const Layer *layer = s->layer;
    int rows = c->rows, crosses = s == c->decoder;
    between(c, number, s, NULL, s->pre_norm ? &layer->attention_norm : NULL, &layer->qkv, rows, 1.0f);
    for (int i = 0; i < s->layers; i++, layer++) {
        int end = i == s->layers - 1;
        const Norm *next_norm = crosses ? &layer->cross_norm : &layer->feed_forward_norm;
        linear(c, number, 0, &layer->qkv, rows, (Then){.out = c->packed});
        barrier(c);
        if (crosses) self_attention(c, number, s, i);
        else encoder_attention(c, number, s, i);
        linear(c, number, 0, &layer->out, rows, (Then){.add = 1, .out = c->x});
        barrier(c);
        between(c, number, s, &layer->attention_norm, s->pre_norm ? next_norm : NULL,
                crosses ? &layer->cross_query : &layer->up, rows, 1.0f);
        if (crosses) {
            linear(c, number, 0, &layer->cross_query, rows, (Then){.out = c->query});
            barrier(c);
            cross_attention(c, number, s, i);
            linear(c, number, 0, &layer->cross_out, rows, (Then){.add = 1, .out = c->x});
            barrier(c);
            between(c, number, s, &layer->cross_norm, s->pre_norm ? &layer->feed_forward_norm : NULL, &layer->up, rows, 1.0f);
        }
        feed_forward(c, number, s, layer, rows);
        between(c, number, s, &layer->feed_forward_norm,
                end ? &s->last_norm : s->pre_norm ? &layer[1].attention_norm : NULL, end ? &s->last : &layer[1].qkv, rows,
                end ? s->output_scale : 1.0f);
    }
}

