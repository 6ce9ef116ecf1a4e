/* The kernels, built from the operations of an instruction set, and their table ``TABLE``.
 *
 * The file that includes this one defines:
 * - Floats and Ints, 16 float32 or int32 values, and the operations f_* and i_* on them, as in scalar.c;
 * - ZERO, tile_int8, tile_float: products of linear layers;
 * - Query, put_query, key_products, COUNT_BYTES, put_counts, gather: products of a decoder's attention;
 * - value_sums: products of a classifier's attention;
 * - tile_bytes, tile_nibbles, tile_floats: products of a language model's matrices; SHORTS, if tile_bytes takes 16-bit inputs;
 * - if it has products of more than MOST_ROWS rows, TILES: their part of the table. */
#include "rows.h"
#include "attention.h"
#include "text_attention.h"
#include "causal.h"
#include "sampling.h"

static void find(Found *f, const float *logits, int first, int n, int best, int scored) {
    if (scored) {
        Floats v[PANEL / 16], most = f_set(-INFINITY), sum = f_load(f->sums);
        for (int j = 0; j < PANEL / 16; j++) {
            v[j] = f_load_or(logits + 16 * j, n - 16 * j, -INFINITY);
            most = f_max(most, v[j]);
        }
        if (f_greater(most, f->highest)) {
            float highest = f_highest(most);
            if (f->highest > -INFINITY) sum = f_mul(sum, f_set(expf(f->highest - highest)));
            f->highest = highest;
        }
        if (f->highest > -INFINITY)
            for (int j = 0; j < PANEL / 16; j++) sum = f_add(sum, exponential(f_sub(v[j], f_set(f->highest))));
        f_store(f->sums, sum);
    }
    for (int j = 0; j < n && best; j += 16) {
        uint32_t over = f_greater(f_load(logits + j), f->threshold) & tail(n - j);
        for (; over; over &= over - 1) {
            int i = j + __builtin_ctz(over), at;
            if (!(logits[i] > f->threshold)) continue;
            at = f->found < best ? f->found++ : best - 1;
            for (; at > 0 && f->values[at - 1] < logits[i]; at--) {
                f->values[at] = f->values[at - 1];
                f->ids[at] = f->ids[at - 1];
            }
            f->values[at] = logits[i];
            f->ids[at] = first + i;
            if (f->found == best) f->threshold = f->values[best - 1];
        }
    }
}

#ifndef TILES
#define TILES \
    .rows = MOST_ROWS, .matrix_rows = MOST_ROWS, .unit = 1, .panels = 1, .queries = MOST_ROWS, .tile = tile, \
    .take_head = take_head, .attend_head = attend_head, .give = give, .multiply = multiply
#endif

const Kernels TABLE = {
    .name = NAME,
    .zero = ZERO,
    TILES,
    .seen_queries = SEEN_QUERIES,
    .give_row = give_row,
    .transform_back = transform_back,
    .normalize = normalize,
    .embed_column = embed_column,
    .embed_row = embed_row,
    .keep = keep,
    .attend = attend,
    .attend_text = attend_text,
    .find = find,
    .pass_gate = pass_gate,
    .cap_values = cap_values,
    .keep_seen = keep_seen,
    .attend_seen = attend_seen,
    .highest_of = highest_of,
    .shares_of = shares_of,
    .find_over = find_over,
};
