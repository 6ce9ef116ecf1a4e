/* Types and functions common to the files of the engine ``native``.
 *
 * The engine runs encoders with a head for a text or for each token, and encoders and decoders of translators, in INT8 on CPUs.
 *
 * Linear layers multiply S8 activations, with one scale per row, by S8 weights, with one scale per column. Keys and values
 * are stored as S8, each vector with its own scale; the decoder multiplies them by 16-bit queries and probabilities.
 * Everything else is float32. Padding is never computed. A row's result depends neither on the other rows nor on the number
 * of threads or the instruction set: integer sums are exact, and float32 sums are always in the same order.
 *
 * Weights are stored in panels of 64 columns: [columns / 64][inputs / 4][64][4] (float32: [columns / 64][inputs][64]),
 * padded with zeros. The rows of a buffer are padded to 64 columns too.
 *
 * All threads run a whole step, with barriers wherever one needs another's results. */
#pragma once
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#define PANEL 64
#define MOST_ROWS 6  /* of a tile in registers */
#define MOST_TILE_ROWS 256 /* of any tile */
#define TILE_BYTES 64
#define TILE_UNIT 16       /* additional rows in buffers of quantized rows, because AMX reads 16 rows at a time */
#define CHUNKS 32    /* fixed parts of the vocabulary, searched by different threads */
#define MOST_BEST 64
#define TEXT_QUERIES 16 /* of a classifier's attention, computed together at most */
#define KEYS_AFTER 4096 /* bytes after its keys that AMX reads, times zeros */
#define QUERIES 4    /* of an encoder's attention, computed together to read keys once */
#define MOST_HEADS 4 /* of a decoder's attention, computed together to hide latency */
#define TOKENS_PER_THREAD 256 /* of a classifier; weights are read once for all of them */
#if defined(_WIN32)
#define API __declspec(dllexport) /* called by Python */
#else
#define API __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

/* translator.py and weights.py fill the structures up to ``Search``, and must have the same fields in the same order. */
typedef struct {
    const void *weight;    /* int8 or float32 panels */
    const float *scale;    /* [out]: of the weights */
    const int32_t *offset; /* [out]: 128 x the column's sum */
    const float *bias;     /* [out] */
    int32_t in, out;
    int32_t is_float;
} Linear;

typedef struct {
    const float *gamma, *beta; /* beta NULL: a root-mean-square norm; gamma NULL: none */
    float epsilon;
} Norm;

typedef struct {
    Linear qkv, out, cross_query, cross_out, up, gate, down; /* the encoder has no cross; gate.weight NULL: none */
    Norm attention_norm, cross_norm, feed_forward_norm;
} Layer;

typedef struct {
    const int8_t *embedding;      /* translator: panels, a column each token; classifier: [vocabulary][hidden] */
    const float *embedding_scale; /* [vocabulary] */
    const float *positions;       /* [length][hidden] or NULL */
    const float *bias;            /* [heads][distances] or NULL */
    const Layer *layer;
    Norm embedding_norm, last_norm;
    Linear last; /* applied to the last hidden states: cross keys and values, or the vocabulary */
    float scale, output_scale;
    int32_t layers, hidden, heads, head_size, pre_norm, activation, distances, zero_distance;
} Stack;

/* A classifier's head, after the encoder's ``last``. */
typedef struct {
    Linear out;         /* weight NULL: none, and ``last`` is the head of every token */
    int32_t activation; /* before it */
} Head;

typedef struct {
    int32_t rows;
    int64_t *tokens;       /* [rows] */
    int32_t *past;         /* [rows]: tokens before this one */
    const int32_t *slots;  /* [rows]: the slot that a row writes */
    int32_t *tables;       /* [rows][table]: the slot that holds each position of a row */
    int8_t *cache;         /* [layers][key, value][slot][head][position][head size] */
    float *cache_scale;    /* the same without the last axis */
    const int8_t **cross;  /* [rows]: encode's result for the row's text */
    const int32_t *source; /* [rows]: number of the text's tokens */
    int32_t table, cache_slots, cache_positions;
} Batch;

typedef struct {
    float *logits;              /* [rows][vocabulary] for all logits, or NULL; and unless ``best`` is 0: */
    const int32_t *forced;      /* [rows]: a forced token, or -1 */
    const int32_t *forbidden;   /* tokens of all rows, ascending within a row */
    const int32_t *begin;       /* [rows + 1]: index of each row's first forbidden token */
    const uint8_t *scored;      /* [rows]: whether to compute log-probabilities, not only logits */
    const uint8_t *before;      /* [rows]: whether probabilities include forbidden tokens */
    float *values;              /* [rows][best] */
    int64_t *ids;               /* [rows][best] */
    int32_t best;
} Choice;

typedef struct {
    int64_t *tokens;       /* [rows][stride]: the start token and those generated */
    int64_t *lengths;      /* [rows]: number of tokens */
    const int64_t *limits; /* [rows]: largest length */
    float *sums;           /* [rows]: log-probabilities */
    const uint8_t *ends;   /* [vocabulary]: whether a token ends its sentence */
    int64_t stride;
    int32_t most; /* steps */
} Greedy;

typedef struct {
    float *scores;    /* [beams]: of the finished hypotheses, best first */
    int32_t *lengths; /* [beams]: of their tokens */
    int64_t *tokens;  /* [beams][stride], without the start token */
    int64_t stride;
    double length_penalty;
    int32_t beams, max_length, early_stopping; /* 0: no, 1: yes, 2: never */
    int32_t finished, improvable, done;
} Beam;

typedef struct {
    int64_t *tokens;  /* [rows][stride], as in Greedy */
    int64_t *lengths; /* [rows] */
    float *sums;      /* [rows]: log-probabilities */
    const uint8_t *ends;
    int64_t *rows; /* [sentences][beams]: rows of each sentence, best first */
    Beam **beams;  /* [sentences] */
    int64_t stride;
    int32_t sentences, candidates, most;
} Search;

/* The best tokens of a row in a chunk of the vocabulary. */
typedef struct {
    float sums[16];  /* of exp(logit - highest), by lane */
    float highest;   /* logit so far */
    float threshold; /* a logit must exceed this to be among the best */
    int32_t found;
    float values[MOST_BEST];
    int32_t ids[MOST_BEST];
} Found;

/* The input rows of linear layers: float32, or quantized with one scale per row. */
typedef struct {
    float *given;
    uint8_t *quantized;
    float *step;
} Rows;

/* The use of a linear layer's results; ``factor`` and ``out`` have the same strides. */
typedef struct {
    int add;             /* to the present values */
    int activation;
    const float *factor; /* multiplied by, or NULL */
    float *out;
} Then;

typedef struct Context Context;
typedef struct Kernels Kernels;
typedef void (*Work)(Context *, int);

struct Context {
    const Kernels *kernels;
    const Stack *encoder, *decoder; /* decoder NULL: an encoder alone, with the head below */
    const Head *head;
    int threads, stop;
    pthread_t *thread;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    atomic_int generation, arrived, phase, working, sleeping;
    int waker; /* CPU of the thread that woke others last */
    Work work;
    /* scratch, by rows */
    int capacity, positions, best_rows;
    int64_t widest; /* row in ``given`` */
    float *x, *normed, *packed, *query, *middle, *given[2], *step[2], **scores;
    uint8_t *quantized[2];
    Found *found;
    /* the job */
    const Batch *batch;
    const Choice *choice;
    const int64_t *ids;
    const int32_t *places; /* [tokens]: of each in a classifier's ``positions`` */
    const int32_t *starts; /* [texts + 1] */
    int8_t **cross;
    int texts, rows;
    int apart, next; /* classifiers: rows between the threads' own texts (0: they split the rows), and the next text */
    int64_t stepping, choosing; /* nanoseconds spent in steps, and of that in the vocabulary */
    float *logits;              /* [texts or tokens][labels] */
    struct Causal *causal;      /* a language model, or NULL */
};

INLINE int filled(int n) { return (n + PANEL - 1) / PANEL * PANEL; }
INLINE int padded_head(int n) { return (n + 15) / 16 * 16; }

/* Part ``number`` when ``n`` items are split into ``of`` parts. */
INLINE void share(int n, int of, int number, int *first, int *last) {
    *first = (int)((int64_t)n * number / of);
    *last = (int)((int64_t)n * (number + 1) / of);
}

/* Group ``number`` of ``of``: rows of a tile for which weights are read once. */
typedef struct { int row, rows, number, of; } Group;

INLINE int groups_of(int rows, int most) { return (rows + most - 1) / most; }

/* Group ``number`` of ``rows`` rows in groups of up to ``most`` rows, which begin at multiples of ``unit``. */
INLINE Group group(int rows, int most, int unit, int number) {
    int row, end, of = groups_of(rows, most);
    share((rows + unit - 1) / unit, of, number, &row, &end);
    row *= unit;
    end = end * unit < rows ? end * unit : rows;
    return (Group){row, end - row, number, of};
}

/* threads.c */
void barrier(Context *c);
void run(Context *c, Work work);
void *serve(void *argument);
typedef struct { Context *context; int number; } Thread;

/* linear.c */
INLINE Then then_at(Then then, int64_t at) {
    return (Then){then.add, then.activation, then.factor ? then.factor + at : NULL, then.out + at};
}
INLINE Rows buffer(const Context *c, int number) { return (Rows){c->given[number], c->quantized[number], c->step[number]}; }
void linear_of(const Context *c, Rows from, const Linear *l, int rows, int first, int last, Then then);
void linear(Context *c, int number, int from, const Linear *l, int rows, Then then);
void give_rows(Context *c, int number, int from, const Linear *next, int rows);

/* layers.c */
void between(Context *c, int number, const Stack *s, const Norm *after, const Norm *before_next, const Linear *next, int rows,
             float scale);
void feed_forward(Context *c, int number, const Stack *s, const Layer *l, int rows);
void embed(Context *c, const Stack *s, int row, int64_t token, int position);
void layers(Context *c, int number, const Stack *s);

/* encoder.c, decoder.c, vocabulary.c, classifier.c */
void encoder_attention(Context *c, int number, const Stack *s, int layer);
void encode(Context *c, int number);
void self_attention(Context *c, int number, const Stack *s, int layer);
void cross_attention(Context *c, int number, const Stack *s, int layer);
void step(Context *c, int number);
void choose(Context *c, int number, const Stack *s);
void classify(Context *c, int number);
int64_t attention_room(const Stack *s, int positions);

/* context.c */
int reserve(Context *c, int rows, int positions);
void *room(void *old, int64_t bytes); /* of zeros, aligned to 64; instead of ``old`` */
void give_up(void *room);
API Context *deploykit_new(const Stack *encoder, const Stack *decoder, int threads);
API void deploykit_free(Context *c);
API int deploykit_step(Context *c, const Batch *batch, const Choice *choice);
