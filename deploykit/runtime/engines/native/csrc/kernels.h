/* The functions that depend on the instruction set. One file under isa/ makes each table; cpu.c chooses one.
 *
 * Every table gives the same bits: sums of float32 are taken in the order that isa/scalar.c writes out. */
#pragma once
#include "native.h"

/* Keys or values of heads in a decoder's attention, ``apart`` positions from head to head. */
typedef struct {
    const int8_t *bytes;
    const float *scale;
    int64_t apart;
} Kept;

/* Where a decoder's row finds its keys and values. ``table`` NULL: one after another; else ``table`` says each position's
 * slot, and slots are ``stride`` positions apart. */
typedef struct {
    const int32_t *table;
    int64_t stride;
    int32_t n; /* positions */
} Places;

#define MOST_VALUE 1023

/* What a thread needs to attend to the ``n`` tokens of a text of a classifier. A head's keys are a linear layer's weights. */
typedef struct {
    Linear layer;
    Rows queries; /* MOST_ROWS */
    int8_t *keys;
    float *key_scale, *zeros;
    int32_t *key_offset;
    int32_t *values;    /* [keys / 2][head size]: those of two keys, int16 each */
    float *value_scale; /* [head size] */
    float *scores;      /* [MOST_ROWS][keys] */
    int16_t *shares;    /* [MOST_ROWS][keys] */
    float most;         /* 2^most is the highest share: so sums of shares times values fit an int32 */
    int n;
} Attention;

INLINE int padded_values(int n) { return (n + 31) / 32 * 32; }

/* One head of an encoder in a text of ``n`` tokens: rows of query, key and value are ``wide`` floats apart. */
typedef struct {
    const float *query, *key, *value, *bias;
    int64_t wide, out_wide;
    float *out, *scratch;
    int32_t n;
} TextHead;

struct Kernels {
    const char *name;
    int32_t zero; /* is added to quantized activations: 128 where products need unsigned ones */

    /* Write row ``row`` of ``to``, what ``next`` reads: ``x`` times ``scale``. */
    void (*give_row)(Rows to, const Linear *next, int row, const float *x, float scale);
    /* ``y`` becomes ``x`` normalized; both have rows padded to 16. */
    void (*normalize)(const Norm *norm, const float *x, float *y, int n);
    /* ``out``, rows ``stride`` floats apart, becomes rows of ``from`` @ weight + bias of a panel's columns, for the rows of
     * ``g``; with ``add``, that is added to ``out``. */
    void (*tile)(Rows from, const Linear *l, Group g, int panel, int add, float *out, int64_t stride);
    /* A panel's columns of ``rows`` rows: activation(x) * factor. */
    void (*activate)(int activation, const float *factor, float *x, int rows, int64_t stride);
    /* x = embedding of a token, read from a column of panels, + positions (or NULL). */
    void (*embed_column)(const Stack *s, int64_t token, const float *positions, float *x);
    /* The same from a row of the embedding, with one rounding. */
    void (*embed_row)(const Stack *s, int64_t token, const float *positions, float *x);

    /* Write a vector of a head at ``position`` as S8, a key as U8 (128 more); return the value of one step. Keys lie as
     * [positions / 16][head size / 4][16][4], values as [positions / 4][head size / 16][16][4]. */
    float (*keep)(const float *x, int8_t *block, int size, int position, int is_value);
    /* ``heads`` heads of one row, up to MOST_HEADS, over kept keys and values. */
    void (*attend)(int heads, float *scratch, const Stack *s, const float *query, const Kept *keys, const Kept *values,
                   const Places *places, const float *bias, float *out);
    /* One head of an encoder attends to its whole text. */
    void (*attend_text)(const Stack *s, const TextHead *h);

    /* Take a panel's first ``n`` logits, of tokens from ``first`` on, into ``f``: the ``best`` of them, and with ``scored``
     * the sum of their exponentials. */
    void (*find)(Found *f, const float *logits, int first, int n, int best, int scored);

    /* Quantize a head's keys and values for attend_head. */
    void (*take_head)(Attention *h, const Stack *s, const float *key, const float *value, int64_t wide);
    /* ``rows`` queries, up to MOST_ROWS, of the text's tokens from ``from`` on, attend in the head that was taken. */
    void (*attend_head)(Attention *h, const Stack *s, int head, const float *query, int64_t wide, int from, int rows,
                        float *out, int64_t out_wide);
};

enum { NONE, RELU, SILU, GELU, GELU_TANH, TANH };

extern const Kernels kernels_avx512vnni, kernels_avx2, kernels_scalar;

/* cpu.c: the table that new contexts take. */
const Kernels *chosen_kernels(void);
