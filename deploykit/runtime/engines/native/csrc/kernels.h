/* The functions that depend on the instruction set. One file under isa/ makes each table; cpu.c chooses one.
 *
 * All tables give the same bits: float32 sums are in the order that isa/scalar.c defines. */
#pragma once
#include "causal.h"

/* Keys or values of heads in a decoder's attention; heads are ``apart`` positions apart. */
typedef struct {
    const int8_t *bytes;
    const float *scale;
    int64_t apart;
} Kept;

/* The location of a decoder row's keys and values. If ``table`` is NULL they are contiguous; else ``table`` has the slot of
 * each position, and slots are ``stride`` positions apart. */
typedef struct {
    const int32_t *table;
    int64_t stride;
    int32_t n; /* positions */
} Places;

#define MOST_VALUE 1023
#define SHARES 256 /* of a vocabulary, summed together */

/* A thread's data for attention to the ``n`` tokens of a classifier's text. A head's keys are laid out as a layer's weights. */
typedef struct {
    Linear layer;
    Rows queries; /* TEXT_QUERIES */
    int8_t *keys;
    float *key_scale, *zeros;
    int32_t *key_offset;
    int32_t *values;    /* [keys / 2][head size]: of two keys, int16 each */
    float *value_scale; /* [head size] */
    float *scores;      /* [TEXT_QUERIES][keys] */
    int16_t *shares;    /* [TEXT_QUERIES][keys] */
    float most;         /* 2^most is the highest share, so that sums of shares times values fit an int32 */
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
    int32_t zero; /* added to quantized activations: 128 if products need unsigned ones */
    int32_t rows, matrix_rows; /* maximum rows of tile (up to MOST_TILE_ROWS) and multiply (up to MATRIX_ROWS) */
    int32_t unit;              /* groups of rows begin at multiples of it */
    int32_t panels;            /* that multiply takes at most, up to MOST_PANELS */
    int32_t queries;           /* that attend_head takes at most, up to TEXT_QUERIES */
    int32_t seen_queries;      /* that attend_seen takes at most, up to MOST_QUERIES */
    /* Release the thread's tile registers, after its part of a job; may be NULL. */
    void (*release)(void);

    /* Write row ``row`` of ``to``, the input of ``next``: ``x`` times ``scale``. */
    void (*give_row)(Rows to, const Linear *next, int row, const float *x, float scale);
    /* Normalize ``x`` to ``y``; both have rows padded to 16. */
    void (*normalize)(const Norm *norm, const float *x, float *y, int n);
    /* Compute rows of ``from`` @ weight + bias for a panel's columns and the rows of ``g``, then activation(...) * factor. The
     * rows of ``then.out`` are ``stride`` floats apart. */
    void (*tile)(Rows from, const Linear *l, Group g, int panel, Then then, int64_t stride);
    /* Compute x = embedding of a token, a column of panels, + positions (may be NULL). */
    void (*embed_column)(const Stack *s, int64_t token, const float *positions, float *x);
    /* Do the same with a row of the embedding, with one rounding. */
    void (*embed_row)(const Stack *s, int64_t token, const float *positions, float *x);

    /* Write a vector of a head at ``position`` as S8, or a key as U8 (plus 128). Returns its scale. The layout of keys is
     * [positions / 16][head size / 4][16][4], of values [positions / 4][head size / 16][16][4]. */
    float (*keep)(const float *x, int8_t *block, int size, int position, int is_value);
    /* Attention of ``heads`` heads of one row, up to MOST_HEADS, over cached keys and values. */
    void (*attend)(int heads, float *scratch, const Stack *s, const float *query, const Kept *keys, const Kept *values,
                   const Places *places, const float *bias, float *out);
    /* Attention of one head of an encoder over its whole text. */
    void (*attend_text)(const Stack *s, const TextHead *h);

    /* Add a panel's first ``n`` logits, of the tokens from ``first`` on, to ``f``: the ``best`` of them, and if ``scored`` the
     * sum of their exponentials. */
    void (*find)(Found *f, const float *logits, int first, int n, int best, int scored);

    /* Quantize a head's keys and values for attend_head. */
    void (*take_head)(Attention *h, const Stack *s, const float *key, const float *value, int64_t wide);
    /* Attention of ``rows`` queries, up to ``queries``, of the tokens from ``from`` on, in the head quantized last. */
    void (*attend_head)(Attention *h, const Stack *s, int head, const float *query, int64_t wide, int from, int rows,
                        float *out, int64_t out_wide);

    /* Write row ``row`` of ``to``, the input of the matrix ``next``. */
    void (*give)(const Given *to, const Matrix *next, int row, const float *x);
    /* Undo the transform of ``m``'s inputs in ``x``, [inputs]. */
    void (*transform_back)(const Matrix *m, float *x);
    /* Compute ``rows`` rows of ``from`` from ``row`` on times ``panels`` panels from ``panel`` on, + bias. Write them to
     * ``out``, whose rows are ``stride`` floats apart, or add them to it if ``add``. */
    void (*multiply)(const Given *from, const Matrix *m, int row, int rows, int panel, int panels, int add, float *out,
                     int64_t stride, Ahead ahead);
    /* Compute activation(x) of 16 columns, or if ``gated`` activation(gate) * x of 16 columns of a gate and the 16 after them.
     * Rows of ``x`` are ``apart``, those of ``out`` ``stride`` floats apart. */
    void (*pass_gate)(int activation, int gated, const float *x, int64_t apart, int rows, float *out, int64_t stride);
    /* Compute cap * tanh(x / cap). */
    void (*cap_values)(float *x, int n, float cap);
    /* Write a head's key and value at ``position`` of caches of a ``kind``. */
    void (*keep_seen)(int kind, const float *key, const float *value, int size, int position, uint8_t *keys, uint8_t *values);
    /* Attention of ``queries`` queries (up to ``seen_queries``) that share keys and values. ``scores`` has room for each position
     * of each query. */
    void (*attend_seen)(const Seen *s, int queries, const SeenBy *q, float *scores);

    /* Return the largest of ``n`` values. */
    float (*highest_of)(const float *x, int n);
    /* Compute 2^((x - highest) * slope), and the sum of each SHARES of them. */
    void (*shares_of)(const float *x, int n, float highest, float slope, float *shares, double *sums);
    /* Write the positions of the values over ``limit``, ascending. Returns their number. */
    int (*find_over)(const float *x, int n, float limit, int32_t *places);
};

/* Group ``number`` of the rows of a linear layer. */
INLINE Group group_of(const Kernels *k, int rows, int number) { return group(rows, k->rows, k->unit, number); }

enum { NONE, RELU, SILU, GELU, GELU_TANH, TANH };

extern const Kernels kernels_amx, kernels_avx512vnni, kernels_avx512, kernels_avxvnni, kernels_avx2;
extern const Kernels kernels_i8mm, kernels_dotprod, kernels_neon, kernels_scalar;

/* cpu.c: the table for new contexts. */
const Kernels *chosen_kernels(void);
