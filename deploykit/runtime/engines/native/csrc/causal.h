/* Structures of decoder-only language models. causal_weights.py and causal_lm.py fill them, and must have the same fields in
 * the same order.
 *
 * Matrices are stored in panels of 16 columns, with inputs padded with zeros to 32:
 * - float32: [panels][inputs][16];
 * - INT8: [panels][inputs / 4][16][4], with a scale for each column. Rows are rounded to 8 bits with one scale each, after a
 *   Hadamard transform, which spreads outliers over many inputs: without it they would leave few levels to the other inputs.
 *   The weights are transformed too, so the products stay the same (QuaRot; Ashkboos et al., NeurIPS 2024);
 * - INT4: [panels][inputs / 32][4][16][4], where byte j of step s has the input 4 s + j in its low bits and 16 + 4 s + j in its
 *   high ones. Each 32 inputs of a column have a bfloat16 scale and minimum. Rows are rounded to 8 bits with a scale for each
 *   32 inputs.
 *
 * Keys and values are float16, float32, or INT8 with a scale for each vector: keys [positions / 16][head size][16], values
 * [positions][head size], each head padded to 16. INT8: after each 16 keys are their scales, then those of their values. */
#pragma once
#include "native.h"

#define COLUMNS 16
#define BLOCK 32
#define LARGEST_HEAD 256
#define MATRIX_ROWS 256 /* maximum rows of a product with a panel */
#define MOST_PANELS 2

enum { FLOAT32 = 1, INT8, INT4, FLOAT16 };

typedef struct {
    const void *weight;
    const void *scale;    /* INT8: float32 [columns]; INT4: bfloat16 [panels][blocks][16] */
    const uint16_t *low;  /* INT4: the minimum, as the scale */
    const float *bias;    /* [columns] */
    const float *signs;   /* INT8: [inputs], 1 or -1, by which inputs are multiplied before the transform */
    const int32_t *offset; /* INT8: [columns], 128 x the column's sum */
    int32_t in, out, kind;
    int32_t together;     /* INT8: inputs that are transformed together, a power of two of at least 32 */
} Matrix;

typedef struct {
    Matrix qkv, out, up, down; /* up: alternating panels of gate and up if ``gated`` */
    Norm attention_norm, feed_forward_norm, query_norm, key_norm, after_attention, after_feed_forward;
    int32_t rope, turned, window; /* number of the rotation's table or -1; rotated channels / 2; window, 0: none */
    int32_t gated, parallel, activation;
} CausalLayer;

typedef struct {
    const CausalLayer *layer;
    Matrix embedding, head; /* the embedding has a column for each token */
    Norm norm;
    const float *positions; /* [length][hidden] or NULL */
    int32_t layers, hidden, inner, heads, key_heads, head_size;
    int32_t cache; /* FLOAT16, FLOAT32 or INT8 */
    float scale, embedding_scale, attention_cap, logit_cap; /* a cap of 0: none */
} CausalModel;

/* Tokens to compute, each in a slot of the caches. A slot's tokens are in ascending order of positions. */
typedef struct {
    int32_t rows, wanted;
    const int64_t *tokens;    /* [rows] */
    const int32_t *positions; /* [rows] */
    const int32_t *slots;     /* [rows] */
    const int32_t *places;    /* [wanted]: the rows whose logits are written */
    const float *const *rope; /* [tables]: [positions][cosines, then sines] */
    uint8_t *keys, *values;   /* [slot][layer][key head][positions] */
    int64_t positions_of_slot;
    float *logits; /* [wanted][vocabulary] */
} CausalBatch;

/* The input rows of a matrix, in the type of its products. */
typedef struct {
    uint8_t *rows; /* ``stride`` bytes apart: 4 for each input of the widest matrix */
    float *steps;  /* INT8: the scale; INT4: a scale for each block, then scale x sum for each; ``apart`` floats apart */
    int64_t stride, apart;
    uint8_t *tiles; /* INT8, for AMX: [rows / 16][inputs / 64][16][64] */
} Given;

/* A head's keys and values in a slot. */
typedef struct {
    const uint8_t *keys, *values;
    int32_t kind, size;
    float scale, cap;
    const uint8_t *next; /* keys of the head that is computed after this one, to prefetch */
} Seen;

#define MOST_QUERIES 12 /* that share keys and values, computed together */

/* A query of a head that attends to the positions from ``first`` up to ``n``. */
typedef struct {
    const float *query;
    float *out;
    int32_t first, n;
} SeenBy;

/* Memory to prefetch: ``lines`` cache lines for each 32 inputs of a product. */
typedef struct {
    const char *at;
    int lines;
} Ahead;

INLINE int blocks_of(int n) { return (n + BLOCK - 1) / BLOCK; }
INLINE int wide(int n) { return blocks_of(n) * BLOCK; }
INLINE int panels_of(int n) { return (n + COLUMNS - 1) / COLUMNS; }

/* Bytes of 16 keys, and of a value, of a head that is padded to ``size``. */
INLINE int64_t key_bytes(int cache, int size) { return 16 * (cache == FLOAT32 ? 4 * size : cache == INT8 ? size + 8 : 2 * size); }
INLINE int64_t value_bytes(int cache, int size) { return cache == FLOAT32 ? 4 * size : cache == INT8 ? size : 2 * size; }

/* Bytes of a panel. */
INLINE int64_t panel_bytes(const Matrix *m) {
    int64_t values = (int64_t)wide(m->in) * COLUMNS;
    return m->kind == FLOAT32 ? 4 * values : m->kind == INT8 ? values : values / 2;
}
