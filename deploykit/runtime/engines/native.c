/* Encoder and decoder of a translation model in INT8, and encoder classifiers, for x86-64 CPUs with AVX-512 VNNI.
 *
 * Linear layers multiply S8 activations with a scale a row (as U8: 128 more) by S8 weights with a scale a column. Keys and
 * values are kept as S8, each vector with a scale of its own; the decoder multiplies them by queries and probabilities in 16
 * bits. All else is float32. No padding is computed, and what is computed of a row does not depend on the rows beside it, nor
 * on the number of threads: its integer sums are exact, its float32 sums are always taken in the same order.
 *
 * Weights lie in panels of 64 columns: [columns / 64][inputs / 4][64][4] (float32: [columns / 64][inputs][64]), columns and
 * inputs filled up with zeros. Buffers have rows of columns filled up to 64 likewise.
 *
 * All threads run a whole step, and meet at a barrier where one needs what another computed.
 *
 * Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", VPDPBUSD; Milakov and Gimelshein,
 * "Online normalizer calculation for softmax", 2018. */
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PANEL 64
#define MOST_ROWS 6 /* of a tile: its sums, a panel's columns each, are 24 of the 32 registers */
#define CHUNKS 32   /* parts of the vocabulary that are searched apart: of fixed borders, whoever takes them */
#define MOST_BEST 64
#define SPINS 3000 /* about 50 us: who has not come by then does not run, and may need this very CPU */
#define INLINE static inline __attribute__((always_inline))

/* The structures are filled in by native.py and native_weights.py, which have the same fields in the same order. */
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
    const int8_t *embedding;      /* panels, a column each token */
    const float *embedding_scale; /* [vocabulary] */
    const float *positions;       /* [length][hidden] or NULL */
    const float *bias;            /* [heads][distances] or NULL */
    const Layer *layer;
    Norm embedding_norm, last_norm;
    Linear last; /* what reads the last hidden states: cross keys and values, or the vocabulary */
    float scale, output_scale;
    int32_t layers, hidden, heads, head_size, pre_norm, activation, distances, zero_distance;
} Stack;

typedef struct {
    Linear out;
    int32_t activation; /* before it */
} Head;

typedef struct {
    int32_t rows;
    int64_t *tokens;       /* [rows] */
    int32_t *past;         /* [rows]: tokens before this one */
    const int32_t *slots;  /* [rows]: where a row writes */
    int32_t *tables;       /* [rows][table]: the slot that holds each position of a row */
    int8_t *cache;         /* [layers][key, value][slot][head][position][head size] */
    float *cache_scale;    /* the same without the last axis */
    const int8_t **cross;  /* [rows]: of the row's text, as encode writes it */
    const int32_t *source; /* [rows]: its tokens */
    int32_t table, cache_slots, cache_positions;
} Batch;

typedef struct {
    float *logits;              /* [rows][vocabulary], if all are wanted; else NULL, and: */
    const int32_t *forced;      /* [rows]: a token that must come, or -1 */
    const int32_t *forbidden;   /* tokens of each row in turn, ascending */
    const int32_t *begin;       /* [rows + 1]: where each row's forbidden ones begin */
    const uint8_t *scored;      /* [rows]: whether log-probabilities are wanted, or logits will do */
    const uint8_t *before;      /* [rows]: probabilities are from before any token was forbidden */
    float *values;              /* [rows][best] */
    int64_t *ids;               /* [rows][best] */
    int32_t best;
} Choice;

typedef struct {
    int64_t *tokens;       /* [rows][stride]: the start token and what came since */
    int64_t *lengths;      /* [rows]: how many that is */
    const int64_t *limits; /* [rows]: of the lengths */
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
    int64_t *tokens;  /* [rows][stride], as of Greedy */
    int64_t *lengths; /* [rows] */
    float *sums;      /* [rows]: log-probabilities */
    const uint8_t *ends;
    int64_t *rows; /* [sentences][beams]: those of each sentence, best first */
    Beam **beams;  /* [sentences] */
    int64_t stride;
    int32_t sentences, candidates, most;
} Search;

typedef struct {
    float sums[16];  /* of exp(logit - highest), by lane */
    float highest;   /* logit so far */
    float threshold; /* what enters the best must exceed it */
    int32_t found;
    float values[MOST_BEST];
    int32_t ids[MOST_BEST];
} Found;

typedef struct { /* what linear layers read of rows: float32, or quantized, with what one step is worth */
    float *given;
    uint8_t *quantized;
    float *step;
} Rows;

typedef struct Context Context;
typedef void (*Work)(Context *, int);

struct Context {
    const Stack *encoder, *decoder; /* the decoder NULL: it classifies, with the encoder's last layer and */
    const Head *head;
    int threads, stop;
    pthread_t *thread;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    atomic_int generation, sleeping, arrived, phase, working;
    Work work;
    /* scratch, by rows */
    int capacity, positions, best_rows;
    int64_t widest; /* row in ``given`` */
    float *x, *normed, *packed, *query, *middle, *given[2], *step[2], **scores; /* step: what one of ``quantized`` is worth */
    uint8_t *quantized[2];
    Found *found;
    /* the job */
    const Batch *batch;
    const Choice *choice;
    const int64_t *ids;
    const int32_t *starts; /* [texts + 1] */
    int8_t **cross;
    int texts, rows;
    /* nanoseconds of all steps, and of their share in the vocabulary */
    int64_t stepping, choosing;
    float *logits; /* [texts][labels] */
};

/* ---- threads ---- */

static void barrier(Context *c) {
    if (c->threads == 1) return;
    int phase = atomic_load_explicit(&c->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&c->arrived, 1, memory_order_acq_rel) == c->threads - 1) {
        atomic_store_explicit(&c->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&c->phase, phase + 1, memory_order_release);
        return;
    }
    for (int n = 0; atomic_load_explicit(&c->phase, memory_order_acquire) == phase; n++) {
        if (n < SPINS) _mm_pause();
        else sched_yield();
    }
}

typedef struct { Context *context; int number; } Thread;

static void *serve(void *argument) {
    Thread *t = argument;
    Context *c = t->context;
    int number = t->number, seen = 0;
    free(t);
    for (;;) {
        for (int n = 0; n < 4000 && atomic_load_explicit(&c->generation, memory_order_acquire) == seen; n++) _mm_pause();
        if (atomic_load_explicit(&c->generation, memory_order_acquire) == seen) {
            pthread_mutex_lock(&c->mutex);
            while (atomic_load(&c->generation) == seen) pthread_cond_wait(&c->wake, &c->mutex);
            pthread_mutex_unlock(&c->mutex);
        }
        seen++;
        if (c->stop) return NULL;
        c->work(c, number);
        atomic_fetch_sub_explicit(&c->working, 1, memory_order_release);
    }
}

static void run(Context *c, Work work) {
    if (c->threads > 1) {
        c->work = work;
        atomic_store(&c->working, c->threads - 1);
        pthread_mutex_lock(&c->mutex);
        atomic_fetch_add(&c->generation, 1);
        pthread_cond_broadcast(&c->wake);
        pthread_mutex_unlock(&c->mutex);
    }
    if (work) work(c, 0);
    for (int n = 0; c->threads > 1 && !c->stop && atomic_load_explicit(&c->working, memory_order_acquire); n++) {
        if (n < SPINS) _mm_pause();
        else sched_yield();
    }
}

INLINE void share(int n, int threads, int number, int *first, int *last) {
    *first = (int)((int64_t)n * number / threads);
    *last = (int)((int64_t)n * (number + 1) / threads);
}

/* ---- vectors ---- */

INLINE int filled(int n) { return (n + PANEL - 1) / PANEL * PANEL; }
INLINE int padded_head(int n) { return (n + 15) / 16 * 16; }
INLINE __mmask16 tail(int left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

/* 2^x: off by 4e-6 of it. */
INLINE __m512 power_of_two(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, 1); /* from the next whole number below */
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.01367031f), r, _mm512_set1_ps(0.05174500f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24160436f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69297292f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.00000349f));
    return _mm512_scalef_ps(p, x);
}

INLINE __m512 exp512(__m512 x) { return power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f))); }

/* Of the normal distribution, less 1/2, for x from 0: around each multiple of 1/2 a polynomial of degree 4, through
 * Chebyshev's nodes; off by 1e-6 at most. */
static const float NORMAL[5][16] = {
    {0.0f, 0.191462457f, 0.341344744f, 0.43319279f, 0.477249861f, 0.493790329f, 0.498650104f, 0.499767363f, 0.49996832f,
     0.499996603f, 0.499999702f, 0.49999997f, 0.5f, 0.5f, 0.5f, 0.5f},
    {0.398930222f, 0.352059752f, 0.241975576f, 0.129524708f, 0.0539937243f, 0.0175275113f, 0.00443050405f, 0.000871974393f,
     0.000133605892f, 1.59354095e-05f, 1.47928154e-06f, 1.06859041e-07f, 6.00556893e-09f, 2.62526889e-10f, 8.9235945e-12f, 0.0f},
    {0.0f, -0.0880126134f, -0.120982915f, -0.097138986f, -0.053992603f, -0.0219110046f, -0.0066476413f, -0.00152697531f,
     -0.000267559342f, -3.59359838e-05f, -3.71179499e-06f, -2.95521829e-07f, -1.81668334e-08f, -8.63360883e-10f,
     -3.1731593e-11f, 0.0f},
    {-0.0657169595f, -0.0436516181f, -0.000311340322f, 0.0265270509f, 0.0268191658f, 0.015388051f, 0.00599527685f,
     0.00168158649f, 0.000348901987f, 5.43625756e-05f, 6.42022997e-06f, 5.78287484e-07f, 3.98993194e-08f, 2.11539497e-09f,
     8.63894373e-11f, 0.0f},
    {0.0f, 0.0199321527f, 0.0200072788f, 0.00612167129f, -0.00439435756f, -0.00589381065f, -0.00333233038f, -0.00119126972f,
     -0.000296431972f, -5.34493411e-05f, -7.13324334e-06f, -7.13719089e-07f, -5.39915064e-08f, -3.10649417e-09f,
     -1.36867628e-10f, 0.0f},
};

INLINE __m512 normal512(__m512 x) {
    const __m512 shift = _mm512_set1_ps(6291456.0f); /* its last bit is worth 1/2 */
    __m512 at = _mm512_add_ps(_mm512_min_ps(x, _mm512_set1_ps(7.5f)), shift);
    __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(at, shift));
    __m512i i = _mm512_castps_si512(at);
    __m512 p = _mm512_permutexvar_ps(i, _mm512_loadu_ps(NORMAL[4]));
    for (int k = 3; k >= 0; k--) p = _mm512_fmadd_ps(p, r, _mm512_permutexvar_ps(i, _mm512_loadu_ps(NORMAL[k])));
    return p;
}

INLINE __m512 sigmoid512(__m512 x) {
    __m512 least = _mm512_max_ps(x, _mm512_set1_ps(-88.0f)); /* below it the exponential is infinite */
    __m512 y = _mm512_add_ps(_mm512_set1_ps(1.0f), power_of_two(_mm512_mul_ps(least, _mm512_set1_ps(-1.44269504f))));
    __m512 r = _mm512_rcp14_ps(y); /* and a step of Newton's: a division takes twice as long */
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(y, r, _mm512_set1_ps(2.0f)));
}

enum { NONE, RELU, SILU, GELU, GELU_TANH, TANH };

INLINE __m512 activated(int kind, __m512 x) {
    switch (kind) {
    case RELU: return _mm512_max_ps(x, _mm512_setzero_ps());
    case SILU: return _mm512_mul_ps(x, sigmoid512(x));
    case GELU: {
        __m512 a = _mm512_abs_ps(x);
        return _mm512_fmadd_ps(a, normal512(a), _mm512_mul_ps(x, _mm512_set1_ps(0.5f)));
    }
    case GELU_TANH: { /* 0.5 (1 + tanh y) is the sigmoid of 2 y */
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        __m512 y = _mm512_mul_ps(_mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, x), _mm512_set1_ps(1.59576912f));
        return _mm512_mul_ps(x, sigmoid512(y));
    }
    case TANH: return _mm512_fmsub_ps(_mm512_set1_ps(2.0f), sigmoid512(_mm512_add_ps(x, x)), _mm512_set1_ps(1.0f));
    default: return x;
    }
}

/* 16 of ``n`` values, those after them as zeros. */
INLINE __m512 part(const float *x, int i, int n) { return _mm512_maskz_loadu_ps(i < n ? tail(n - i) : 0, x + i); }

/* The largest magnitude of ``n`` values. */
INLINE float largest_of(const float *x, int n) {
    __m512 most = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(part(x, i, n)));
    return _mm512_reduce_max_ps(most);
}

INLINE Rows buffer(const Context *c, int number) { return (Rows){c->given[number], c->quantized[number], c->step[number]}; }

/* What ``next`` reads of a row: ``x`` times ``scale``. */
static void give_row(Rows to, const Linear *next, int row, const float *x, float scale) {
    int wide = filled(next->in);
    if (next->is_float) {
        float *y = to.given + (int64_t)row * wide;
        for (int i = 0; i < wide; i += 16)
            _mm512_storeu_ps(y + i, _mm512_mul_ps(part(x, i, next->in), _mm512_set1_ps(scale)));
        return;
    }
    uint8_t *y = to.quantized + (int64_t)row * wide;
    float highest = largest_of(x, next->in);
    __m512 inverse = _mm512_set1_ps(highest > 0 ? 127.0f / highest : 0.0f);
    for (int i = 0; i < wide; i += 16) {
        __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(part(x, i, next->in), inverse));
        _mm_storeu_si128((__m128i *)(y + i), _mm512_cvtusepi32_epi8(_mm512_add_epi32(n, _mm512_set1_epi32(128))));
    }
    to.step[row] = highest / 127.0f * scale;
}

/* What the threads have put together in ``given`` of a buffer, as ``next`` reads it. */
static void give_rows(Context *c, int number, int from, const Linear *next, int rows) {
    int first, last;
    barrier(c);
    if (next->is_float) return;
    share(rows, c->threads, number, &first, &last);
    for (int row = first; row < last; row++)
        give_row(buffer(c, from), next, row, c->given[from] + (int64_t)row * filled(next->in), 1.0f);
    barrier(c);
}

static void normalize(const Norm *norm, const float *x, float *y, int n) {
    __m512 sum = _mm512_setzero_ps(), mean = sum;
    if (norm->beta) {
        for (int i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(tail(n - i), x + i));
        mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)n);
        sum = _mm512_setzero_ps();
    }
    for (int i = 0; i < n; i += 16) {
        __m512 d = _mm512_maskz_sub_ps(tail(n - i), _mm512_loadu_ps(x + i), mean);
        sum = _mm512_fmadd_ps(d, d, sum);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)n + norm->epsilon));
    for (int i = 0; i < n; i += 16) {
        __mmask16 mask = tail(n - i);
        __m512 d = _mm512_mul_ps(_mm512_maskz_sub_ps(mask, _mm512_loadu_ps(x + i), mean), scale);
        __m512 beta = norm->beta ? _mm512_maskz_loadu_ps(mask, norm->beta + i) : _mm512_setzero_ps();
        _mm512_storeu_ps(y + i, _mm512_fmadd_ps(d, _mm512_maskz_loadu_ps(mask, norm->gamma + i), beta));
    }
}

/* ---- linear layers ---- */

/* Some of the rows, which share what is read of the weights: group ``number`` of ``of``. */
typedef struct { int row, rows, number, of; } Group;

INLINE int groups_of(int rows) { return (rows + MOST_ROWS - 1) / MOST_ROWS; }

INLINE Group group(int rows, int number) {
    int row, end, of = groups_of(rows);
    share(rows, of, number, &row, &end);
    return (Group){row, end - row, number, of};
}

#define LEAST_GROUPS 3 /* of which each can fetch some of the next panel: fewer would have to fetch faster than memory gives */

/* Sums begin below zero by what activations that are 128 too high add to them. ``ahead``: weights that will be wanted next,
 * ``apart`` bytes for each four inputs. */
INLINE void tile_int8(const int rows, const uint8_t *x, int64_t wide, const float *step, const Linear *l, int first, int add,
                      float *out, int64_t stride, const int8_t *ahead, int apart) {
    int quads = (l->in + 3) / 4;
    const int8_t *w = (const int8_t *)l->weight + (int64_t)first * quads * 4;
    __m512i s[MOST_ROWS][4];
    for (int j = 0; j < 4; j++) {
        s[0][j] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(l->offset + first + 16 * j));
        for (int r = 1; r < rows; r++) s[r][j] = s[0][j];
    }
    for (int k = 0; k < quads; k++, w += 4 * PANEL) {
        __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
        __m512i w2 = _mm512_load_si512(w + 128), w3 = _mm512_load_si512(w + 192);
        _mm_prefetch(ahead + (int64_t)k * apart, _MM_HINT_T0);
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * wide + 4 * k, 4);
            __m512i v = _mm512_set1_epi32(four);
            s[r][0] = _mm512_dpbusd_epi32(s[r][0], v, w0);
            s[r][1] = _mm512_dpbusd_epi32(s[r][1], v, w1);
            s[r][2] = _mm512_dpbusd_epi32(s[r][2], v, w2);
            s[r][3] = _mm512_dpbusd_epi32(s[r][3], v, w3);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 scale = _mm512_loadu_ps(l->scale + first + 16 * j), bias = _mm512_loadu_ps(l->bias + first + 16 * j);
        for (int r = 0; r < rows; r++) {
            __m512 worth = _mm512_mul_ps(scale, _mm512_set1_ps(step[r]));
            __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[r][j]), worth, bias);
            float *to = out + r * stride + 16 * j;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(v, _mm512_loadu_ps(to)) : v);
        }
    }
}

INLINE void tile_float(const int rows, const float *x, int64_t wide, const Linear *l, int first, int add, float *out,
                       int64_t stride) {
    const float *w = (const float *)l->weight + (int64_t)first * l->in;
    __m512 s[MOST_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++) s[r][j] = _mm512_setzero_ps();
    for (int k = 0; k < l->in; k++, w += PANEL)
        for (int r = 0; r < rows; r++) {
            __m512 v = _mm512_set1_ps(x[r * wide + k]);
            for (int j = 0; j < 4; j++) s[r][j] = _mm512_fmadd_ps(v, _mm512_load_ps(w + 16 * j), s[r][j]);
        }
    for (int j = 0; j < 4; j++) {
        __m512 bias = _mm512_loadu_ps(l->bias + first + 16 * j);
        for (int r = 0; r < rows; r++) {
            __m512 v = _mm512_add_ps(s[r][j], bias);
            float *to = out + r * stride + 16 * j;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(v, _mm512_loadu_ps(to)) : v);
        }
    }
}

/* ``out``, rows of ``stride``, becomes x @ weight + bias of a panel's columns, for the rows of ``g``, or with ``add`` that and
 * what it was. */
static void tile(Rows from, const Linear *l, Group g, int panel, int add, float *out, int64_t stride) {
    int64_t wide = filled(l->in), bytes = (l->in + 3) / 4 * (4 * PANEL);
    int first = panel * PANEL, apart = g.of < LEAST_GROUPS ? 0 : (4 * PANEL + g.of - 1) / g.of;
    const float *x = from.given + g.row * wide, *step = from.step + g.row;
    const uint8_t *q = from.quantized + g.row * wide;
    const int8_t *ahead = (const int8_t *)l->weight + (apart ? (panel + 1) * bytes + bytes * g.number / g.of : panel * bytes);
#define ROWS(n) \
    if (l->is_float) tile_float(n, x, wide, l, first, add, out, stride); \
    else tile_int8(n, q, wide, step, l, first, add, out, stride, ahead, apart); \
    break
    switch (g.rows) {
    case 1: ROWS(1);
    case 2: ROWS(2);
    case 3: ROWS(3);
    case 4: ROWS(4);
    case 5: ROWS(5);
    default: ROWS(6);
    }
}

typedef struct {
    int add;             /* to what is there */
    int activation;
    const float *factor; /* multiplied by, or NULL */
    float *out;
} Then;

/* ``rows`` rows, as far as the columns of panels from ``first`` to ``last``. */
static void linear_of(Rows from, const Linear *l, int rows, int first, int last, Then then) {
    int wide = filled(l->out), groups = groups_of(rows);
    for (int panel = first; panel < last; panel++)
        for (int number = 0; number < groups; number++) {
            Group g = group(rows, number);
            int64_t at = (int64_t)g.row * wide + panel * PANEL;
            tile(from, l, g, panel, then.add, then.out + at, wide);
            for (int r = 0; (then.activation || then.factor) && r < g.rows; r++, at += wide)
                for (int j = 0; j < PANEL; j += 16) {
                    __m512 v = activated(then.activation, _mm512_loadu_ps(then.out + at + j));
                    if (then.factor) v = _mm512_mul_ps(v, _mm512_loadu_ps(then.factor + at + j));
                    _mm512_storeu_ps(then.out + at + j, v);
                }
        }
}

/* Each thread has some panels. */
static void linear(Context *c, int number, int from, const Linear *l, int rows, Then then) {
    int first, last;
    share(filled(l->out) / PANEL, c->threads, number, &first, &last);
    linear_of(buffer(c, from), l, rows, first, last, then);
}

static void feed_forward(Context *c, int number, const Stack *s, const Layer *l, int rows) {
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

/* After a block, for each row: its norm, or the next block's, and what the next layer reads. */
static void between(Context *c, int number, const Stack *s, const Norm *after, const Norm *before_next, const Linear *next,
                    int rows, float scale) {
    int first, last, wide = filled(s->hidden);
    share(rows, c->threads, number, &first, &last);
    for (int row = first; row < last; row++) {
        float *x = c->x + (int64_t)row * wide, *given = x;
        if (!s->pre_norm && after) normalize(after, x, x, s->hidden);
        if (before_next && before_next->gamma) {
            given = s->pre_norm ? c->normed + (int64_t)row * wide : x;
            normalize(before_next, x, given, s->hidden);
        }
        give_row(buffer(c, 0), next, row, given, scale);
    }
    barrier(c);
}

static void embed(Context *c, const Stack *s, int row, int64_t token, int position) {
    int wide = filled(s->hidden), quads = (s->hidden + 3) / 4;
    float *x = c->x + (int64_t)row * wide, scale = s->embedding_scale[token];
    const int8_t *column = s->embedding + (token / PANEL) * (int64_t)quads * 4 * PANEL + token % PANEL * 4;
    const float *positions = s->positions ? s->positions + (int64_t)position * s->hidden : NULL;
    for (int i = 0; i < wide; i += 16) {
        int32_t four[4] = {0};
        for (int j = 0; j < 4 && i / 4 + j < quads; j++) memcpy(&four[j], column + (int64_t)(i / 4 + j) * (4 * PANEL), 4);
        __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((__m128i *)four)));
        v = _mm512_mul_ps(v, _mm512_set1_ps(scale));
        _mm512_storeu_ps(x + i, positions ? _mm512_add_ps(v, part(positions, i, s->hidden)) : v);
    }
    if (s->embedding_norm.gamma) normalize(&s->embedding_norm, x, x, s->hidden);
}

/* ---- attention ---- */

static void softmax(float *scores, int n) {
    __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) highest = _mm512_mask_max_ps(highest, tail(n - i), highest, _mm512_loadu_ps(scores + i));
    highest = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
    for (int i = 0; i < n; i += 16) {
        __m512 e = _mm512_maskz_mov_ps(tail(n - i), exp512(_mm512_sub_ps(_mm512_loadu_ps(scores + i), highest)));
        _mm512_storeu_ps(scores + i, e);
        sum = _mm512_add_ps(sum, e);
    }
    __m512 share_ = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    for (int i = 0; i < n; i += 16) _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), share_));
}

static const int32_t COUNT[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Of 16 distances from ``first`` on. */
INLINE __m512 biases(const Stack *s, const float *bias, int first) {
    __m512i d = _mm512_add_epi32(_mm512_set1_epi32(first + s->zero_distance), _mm512_loadu_si512(COUNT));
    d = _mm512_min_epi32(_mm512_max_epi32(d, _mm512_setzero_si512()), _mm512_set1_epi32(s->distances - 1));
    return _mm512_i32gather_ps(d, bias, 4);
}

/* Keys of a head lie as [positions / 16][head size / 4][16][4], values as [positions / 4][head size / 16][16][4]: one
 * VPDPBUSD takes four values of 16 keys, or 16 values of four positions. Writes a vector at ``position`` as S8, a key as U8
 * (128 more); returns what one step is worth. */
static float keep(const float *x, int8_t *block, int size, int position, int is_value) {
    int padded = padded_head(size);
    float highest = largest_of(x, size);
    __m512 inverse = _mm512_set1_ps(highest > 0 ? 127.0f / highest : 0.0f);
    for (int i = 0; i < padded; i += 16) {
        __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(part(x, i, size), inverse));
        if (is_value) {
            int8_t *to = block + (position / 4 * 4) * padded + 4 * i;
            __m512i moved = _mm512_sllv_epi32(v, _mm512_set1_epi32(position % 4 * 8));
            __mmask64 mask = UINT64_C(0x1111111111111111) << position % 4;
            _mm512_storeu_si512(to, _mm512_mask_mov_epi8(_mm512_loadu_si512(to), mask, moved));
        } else {
            int32_t fours[4];
            _mm_storeu_si128((__m128i *)fours, _mm512_cvtepi32_epi8(_mm512_add_epi32(v, _mm512_set1_epi32(128))));
            for (int j = 0; j < 4; j++)
                memcpy(block + (position / 16 * 16) * padded + 16 * i + 64 * j + position % 16 * 4, &fours[j], 4);
        }
    }
    return highest / 127.0f;
}

#define MOST_PARTS 16 /* heads of up to 256 */
#define MOST_HEADS 4  /* that attend together: what one waits for, others compute meanwhile */

/* Keys or values of heads, ``apart`` positions from head to head. */
typedef struct {
    const int8_t *bytes;
    const float *scale;
    int64_t apart;
} Kept;

/* Of the positions ``left`` of 16 those that lie in the slot of the first, which is returned. */
INLINE int64_t slot_of(const int32_t *table, __mmask16 left, __mmask16 *its) {
    int slot = table[__builtin_ctz(left)];
    *its = _mm512_mask_cmpeq_epi32_mask(left, _mm512_loadu_si512(table), _mm512_set1_epi32(slot));
    return slot;
}

/* For each run of 16 positions from ``t``, and for each slot that they lie in (without a table there is one): ``its``, which of
 * them, and ``from``, where the first of the 16 would lie. */
#define EACH_SLOT(t) \
    for (__mmask16 left = tail(n - (t)), its = left; left; left &= ~its) \
        for (int64_t from = (t) + (table ? slot_of(table + (t), left, &its) * stride : 0), once = 1; once; once = 0)

/* Values, each as often as its probability's 16 bits say, as far as ``parts`` parts of 16 of a head. */
INLINE void gather(const int parts, const uint8_t *p, const int8_t *values, int padded, const int32_t *table, int64_t stride,
                   int n, float worth, float *out, int size) {
    __m512i h[4], l[4];
    for (int i = 0; i < parts; i++) h[i] = l[i] = _mm512_setzero_si512();
    for (int t = 0; t < n; t += 16)
        EACH_SLOT(t) {
            int32_t h4[4], l4[4];
            _mm_storeu_si128((__m128i *)h4, _mm_maskz_loadu_epi8(its, p + 2 * t));
            _mm_storeu_si128((__m128i *)l4, _mm_maskz_loadu_epi8(its, p + 2 * t + 16));
            const int8_t *v = values + from * padded;
            for (int j = 0; j < 4 && t + 4 * j < n; j++, v += 4 * padded)
                for (int i = 0; i < parts; i++) {
                    __m512i bytes = _mm512_loadu_si512(v + 64 * i);
                    h[i] = _mm512_dpbusd_epi32(h[i], _mm512_set1_epi32(h4[j]), bytes);
                    l[i] = _mm512_dpbusd_epi32(l[i], _mm512_set1_epi32(l4[j]), bytes);
                }
        }
    for (int i = 0; i < parts; i++) {
        __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(h[i]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(l[i]));
        _mm512_mask_storeu_ps(out + 16 * i, tail(size - 16 * i), _mm512_mul_ps(v, _mm512_set1_ps(worth)));
    }
}

#define EACH_HEAD _Pragma("GCC unroll 4") for (int g = 0; g < heads; g++) /* so that they stay in registers */

/* ``heads`` heads of one row over keys and values in caches. ``table`` NULL: they lie one after another; else slots are
 * ``stride`` positions apart. Queries and probabilities have 16 bits. */
INLINE void attend_heads(const int heads, float *scratch, const Stack *s, const float *query, const Kept *keys,
                         const Kept *values, const int32_t *table, int64_t stride, int n, const float *bias, float *out) {
    int size = s->head_size, padded = padded_head(size), parts = padded / 16, room = (n + 15) / 16 * 16;
    float *scores = scratch, *worths = scores + MOST_HEADS * room;
    uint8_t *p = (uint8_t *)(worths + MOST_HEADS * room); /* of 16 positions each: high bytes, low bytes */
    int8_t high[MOST_HEADS][16 * MOST_PARTS], low[MOST_HEADS][16 * MOST_PARTS];
    float worth[MOST_HEADS], offset[MOST_HEADS];
    __m512 most[MOST_HEADS], highest[MOST_HEADS], sum[MOST_HEADS];
    EACH_HEAD {
        const float *q = query + g * size;
        float largest = largest_of(q, size);
        __m512 inverse = _mm512_set1_ps(largest > 0 ? 32639.0f / largest : 0.0f); /* 127 x 256 + 127 */
        __m512i total = _mm512_setzero_si512();
        for (int i = 0; i < padded; i += 16) {
            __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(part(q, i, size), inverse));
            __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128((__m128i *)(high[g] + i), _mm512_cvtepi32_epi8(h));
            _mm_storeu_si128((__m128i *)(low[g] + i), _mm512_cvtepi32_epi8(v));
            total = _mm512_add_epi32(total, v);
        }
        offset[g] = 128.0f * (float)_mm512_reduce_add_epi32(total);
        worth[g] = largest / 32639.0f * s->scale;
        most[g] = sum[g] = _mm512_setzero_ps();
        highest[g] = _mm512_set1_ps(-INFINITY);
    }
    for (int t = 0; t < n; t += 16) {
        __m512 score[MOST_HEADS], value[MOST_HEADS];
        EACH_HEAD {
            score[g] = _mm512_set1_ps(-INFINITY);
            value[g] = _mm512_setzero_ps();
        }
        EACH_SLOT(t) { /* keys are U8, 128 more than they are; their values come near meanwhile */
            const int8_t *key_bytes = keys->bytes + from * padded, *value_bytes = values->bytes + from * padded;
            __m512i h[MOST_HEADS], l[MOST_HEADS];
            EACH_HEAD h[g] = l[g] = _mm512_setzero_si512();
            for (int i = 0; i < padded / 4; i++)
                EACH_HEAD {
                    int32_t h4, l4;
                    __m512i k = _mm512_loadu_si512(key_bytes + g * keys->apart * padded + 64 * i);
                    _mm_prefetch(value_bytes + g * values->apart * padded + 64 * i, _MM_HINT_T0);
                    memcpy(&h4, high[g] + 4 * i, 4);
                    memcpy(&l4, low[g] + 4 * i, 4);
                    h[g] = _mm512_dpbusd_epi32(h[g], k, _mm512_set1_epi32(h4));
                    l[g] = _mm512_dpbusd_epi32(l[g], k, _mm512_set1_epi32(l4));
                }
            EACH_HEAD {
                int64_t key = g * keys->apart + from, its_value = g * values->apart + from;
                __m512 product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(h[g]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(l[g]));
                score[g] = _mm512_mask_mul_ps(score[g], its, _mm512_sub_ps(product, _mm512_set1_ps(offset[g])),
                                              _mm512_mul_ps(_mm512_set1_ps(worth[g]), _mm512_loadu_ps(keys->scale + key)));
                value[g] = _mm512_mask_loadu_ps(value[g], its, values->scale + its_value);
            }
        }
        EACH_HEAD {
            if (bias) score[g] = _mm512_add_ps(score[g], biases(s, bias + (int64_t)g * s->distances, t - (n - 1)));
            _mm512_storeu_ps(scores + g * room + t, score[g]);
            _mm512_storeu_ps(worths + g * room + t, value[g]);
            highest[g] = _mm512_max_ps(highest[g], score[g]);
            most[g] = _mm512_max_ps(most[g], value[g]);
        }
    }
    __m512 inverse[MOST_HEADS];
    EACH_HEAD {
        float largest = _mm512_reduce_max_ps(most[g]);
        highest[g] = _mm512_set1_ps(_mm512_reduce_max_ps(highest[g]));
        inverse[g] = _mm512_set1_ps(largest > 0 ? 65535.0f / largest : 0.0f);
        worth[g] = largest;
    }
    for (int t = 0; t < n; t += 16) /* what a value counts: its probability, but for the sum of all, and its scale */
        EACH_HEAD {
            __m512 e = exp512(_mm512_sub_ps(_mm512_loadu_ps(scores + g * room + t), highest[g]));
            e = _mm512_maskz_mov_ps(tail(n - t), e);
            sum[g] = _mm512_add_ps(sum[g], e);
            __m512i count = _mm512_cvtps_epi32(_mm512_mul_ps(e, _mm512_mul_ps(inverse[g], _mm512_loadu_ps(worths + g * room + t))));
            _mm_storeu_si128((__m128i *)(p + 2 * (g * room + t)), _mm512_cvtepi32_epi8(_mm512_srli_epi32(count, 8)));
            _mm_storeu_si128((__m128i *)(p + 2 * (g * room + t) + 16), _mm512_cvtepi32_epi8(count));
        }
    EACH_HEAD worth[g] = worth[g] / (65535.0f * _mm512_reduce_add_ps(sum[g]));
    EACH_HEAD
        for (int first = 0; first < parts; first += 4) {
            const int8_t *v = values->bytes + g * values->apart * padded + 64 * first;
            float *to = out + g * size + 16 * first;
            switch (parts - first) {
#define PARTS(some) gather(some, p + 2 * g * room, v, padded, table, stride, n, worth[g], to, size - 16 * first); break
            case 1: PARTS(1);
            case 2: PARTS(2);
            case 3: PARTS(3);
            default: PARTS(4);
            }
        }
}

/* Of a row the ``heads`` heads from ``query`` on, MOST_HEADS at most. */
static void attend(int heads, float *scratch, const Stack *s, const float *query, const Kept *keys, const Kept *values,
                   const int32_t *table, int64_t stride, int n, const float *bias, float *out) {
    switch (heads) {
    case 1: attend_heads(1, scratch, s, query, keys, values, table, stride, n, bias, out); break;
    case 2: attend_heads(2, scratch, s, query, keys, values, table, stride, n, bias, out); break;
    case 3: attend_heads(3, scratch, s, query, keys, values, table, stride, n, bias, out); break;
    default: attend_heads(4, scratch, s, query, keys, values, table, stride, n, bias, out);
    }
}

/* How many heads of ``unit``'s row, from its own on, are to attend together. */
INLINE int together(const Stack *s, int unit, int last) {
    int left = s->heads - unit % s->heads;
    if (left > last - unit) left = last - unit;
    return left < MOST_HEADS ? left : MOST_HEADS;
}

static void self_attention(Context *c, int number, const Stack *s, int layer) {
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
                    keep(packed + (1 + is_value) * width + g * size, b->cache + to * padded, size, past, is_value);
            }
        attend(heads, c->scores[number], s, packed, &(Kept){b->cache + keys * padded, b->cache_scale + keys, b->cache_positions},
               &(Kept){b->cache + values * padded, b->cache_scale + values, b->cache_positions},
               b->tables + (int64_t)row * b->table, stride, past + 1, s->bias ? s->bias + (int64_t)head * s->distances : NULL,
               c->given[0] + (int64_t)row * filled(next->in) + head * size);
    }
    give_rows(c, number, 0, next, b->rows);
}

/* Of a text: int8 [layers][key, value][head], each of its tokens filled up to 16, then their scales, float32. */
static void cross_attention(Context *c, int number, const Stack *s, int layer) {
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
        attend(heads, c->scores[number], s, c->query + (int64_t)row * wide + head * size,
               &(Kept){cross + keys * padded, scales + keys, room}, &(Kept){cross + values * padded, scales + values, room}, NULL, 0,
               n, NULL, c->given[0] + (int64_t)row * filled(next->in) + head * size);
    }
    give_rows(c, number, 0, next, b->rows);
}

/* 16 places of 16 vectors: those of one place, for all of them, come to lie side by side. */
INLINE void transpose(__m512 x[16]) {
    __m512 y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) /* of each quarter of places the one that the index says, four vectors */
        for (int j = 0; j < 2; j++) {
            __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
            x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int j = 0; j < 4; j++) {
        __m512 a = _mm512_shuffle_f32x4(x[j], x[j + 4], 0x88), b = _mm512_shuffle_f32x4(x[j], x[j + 4], 0xdd);
        __m512 c = _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0x88), d = _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0xdd);
        y[j] = _mm512_shuffle_f32x4(a, c, 0x88);
        y[j + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        y[j + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        y[j + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) x[i] = y[i];
}

#define QUERIES 4 /* that read the same keys together */

/* A head of a text attends to the whole text. */
static void encoder_attention(Context *c, int number, const Stack *s, int layer) {
    const Linear *next = &s->layer[layer].out;
    int size = s->head_size, padded = padded_head(size), width = s->heads * size, units = c->texts * s->heads;
    int64_t wide = filled(3 * width), out_wide = filled(next->in);
    for (int unit = number; unit < units; unit += c->threads) {
        int text = unit / s->heads, head = unit % s->heads, start = c->starts[text], n = c->starts[text + 1] - start;
        const float *query = c->packed + start * wide + head * size, *key = query + width, *value = key + width;
        const float *bias = s->bias ? s->bias + (int64_t)head * s->distances : NULL;
        int room = (n + 15) / 16 * 16;
        float *scores = c->scores[number], *keys = scores + QUERIES * room; /* [room / 16][padded][16] */
        for (int t = 0; t < n; t += 16)
            for (int i = 0; i < padded; i += 16) {
                __m512 x[16];
                for (int j = 0; j < 16; j++) x[j] = t + j < n ? part(key + (t + j) * wide, i, size) : _mm512_setzero_ps();
                transpose(x);
                for (int j = 0; j < 16; j++) _mm512_storeu_ps(keys + t * padded + (i + j) * 16, x[j]);
            }
        for (int i = 0; i < n; i += QUERIES) {
            int at[QUERIES]; /* the last token again and again, where there are fewer */
            const float *q[QUERIES];
            for (int a = 0; a < QUERIES; a++) {
                at[a] = i + a < n ? i + a : n - 1;
                q[a] = query + at[a] * wide;
            }
            for (int t = 0; t < n; t += 16) {
                __m512 sum[QUERIES] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
                for (int k = 0; k < size; k++) {
                    __m512 x = _mm512_loadu_ps(keys + t * padded + k * 16);
                    for (int a = 0; a < QUERIES; a++) sum[a] = _mm512_fmadd_ps(_mm512_set1_ps(q[a][k]), x, sum[a]);
                }
                for (int a = 0; a < QUERIES; a++) {
                    __m512 score = _mm512_mul_ps(sum[a], _mm512_set1_ps(s->scale));
                    if (bias) score = _mm512_add_ps(score, biases(s, bias, t - at[a]));
                    _mm512_storeu_ps(scores + a * room + t, score);
                }
            }
            for (int a = 0; a < QUERIES; a++) softmax(scores + a * room, n);
            for (int k = 0; k < size; k += 16) {
                __m512 sum[QUERIES] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
                __mmask16 mask = tail(size - k);
                for (int j = 0; j < n; j++) {
                    __m512 v = _mm512_maskz_loadu_ps(mask, value + j * wide + k);
                    for (int a = 0; a < QUERIES; a++)
                        sum[a] = _mm512_fmadd_ps(_mm512_set1_ps(scores[a * room + j]), v, sum[a]);
                }
                for (int a = 0; a < QUERIES; a++)
                    _mm512_mask_storeu_ps(c->given[0] + (start + at[a]) * out_wide + head * size + k, mask, sum[a]);
            }
        }
    }
    give_rows(c, number, 0, next, c->rows);
}

/* ---- the vocabulary ---- */

static void find(Found *f, const float *logits, int first, int n, int best, int scored) {
    if (scored) {
        __m512 v[PANEL / 16], most = _mm512_set1_ps(-INFINITY), sum = _mm512_loadu_ps(f->sums);
        for (int j = 0; j < PANEL / 16; j++) {
            v[j] = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), n > 16 * j ? tail(n - 16 * j) : 0, logits + 16 * j);
            most = _mm512_max_ps(most, v[j]);
        }
        if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(f->highest), _CMP_GT_OQ)) {
            float highest = _mm512_reduce_max_ps(most);
            if (f->highest > -INFINITY) sum = _mm512_mul_ps(sum, _mm512_set1_ps(expf(f->highest - highest)));
            f->highest = highest;
        }
        if (f->highest > -INFINITY)
            for (int j = 0; j < PANEL / 16; j++)
                sum = _mm512_add_ps(sum, exp512(_mm512_sub_ps(v[j], _mm512_set1_ps(f->highest))));
        _mm512_storeu_ps(f->sums, sum);
    }
    for (int j = 0; j < n && best; j += 16) {
        __m512 v = _mm512_loadu_ps(logits + j);
        __mmask16 over = _mm512_mask_cmp_ps_mask(tail(n - j), v, _mm512_set1_ps(f->threshold), _CMP_GT_OQ);
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

static void answer(Context *c, int row, int chunks) {
    const Choice *choice = c->choice;
    int best = choice->best;
    float *values = choice->values + (int64_t)row * best, highest = -INFINITY, sum = 0.0f, log_sum = 0.0f;
    int64_t *ids = choice->ids + (int64_t)row * best;
    int at[CHUNKS] = {0}, found = 0;
    if (choice->forced[row] >= 0) {
        values[0] = 0.0f;
        ids[0] = choice->forced[row];
        found = 1;
    } else {
        for (int k = 0; k < chunks; k++) {
            float h = c->found[(int64_t)k * c->rows + row].highest;
            if (h > highest) highest = h;
        }
        for (int k = 0; k < chunks && choice->scored[row]; k++) {
            const Found *f = &c->found[(int64_t)k * c->rows + row];
            if (f->highest > -INFINITY) sum += _mm512_reduce_add_ps(_mm512_loadu_ps(f->sums)) * expf(f->highest - highest);
        }
        if (choice->scored[row]) log_sum = highest + logf(sum);
        for (; found < best; found++) { /* of equals the first chunk's, which has the lower id */
            int from = -1;
            for (int k = 0; k < chunks; k++) {
                const Found *f = &c->found[(int64_t)k * c->rows + row];
                if (at[k] < f->found &&
                    (from < 0 || f->values[at[k]] > c->found[(int64_t)from * c->rows + row].values[at[from]]))
                    from = k;
            }
            if (from < 0) break;
            const Found *f = &c->found[(int64_t)from * c->rows + row];
            values[found] = f->values[at[from]] - log_sum;
            ids[found] = f->ids[at[from]++];
        }
    }
    for (int64_t id = 0; found < best; id++) { /* what is forbidden fills the rest */
        int there = 0;
        for (int i = 0; i < found; i++) there |= ids[i] == id;
        if (there) continue;
        values[found] = -INFINITY;
        ids[found++] = id;
    }
}

static void choose(Context *c, int number, const Stack *s) {
    const Linear *l = &s->last;
    const Choice *choice = c->choice;
    int rows = c->rows, panels = filled(l->out) / PANEL, chunks = (panels + 7) / 8 < CHUNKS ? (panels + 7) / 8 : CHUNKS;
    int groups = groups_of(rows), mine, end;
    share(chunks, c->threads, number, &mine, &end);
    for (const int first_chunk = mine; mine < end; mine++) {
        int panel, last;
        Found *found = c->found + (int64_t)mine * rows;
        share(panels, chunks, mine, &panel, &last);
        for (int row = 0; row < rows && !choice->logits; row++) { /* what this thread has found before bounds what matters */
            float threshold = mine > first_chunk ? (found - rows)[row].threshold : -INFINITY;
            found[row].highest = -INFINITY;
            _mm512_storeu_ps(found[row].sums, _mm512_setzero_ps());
            found[row].threshold = threshold;
            found[row].found = 0;
        }
        for (; panel < last; panel++) {
            int first = panel * PANEL, n = l->out - first < PANEL ? l->out - first : PANEL;
            for (int number = 0; number < groups; number++) {
                Group g = group(rows, number);
                float of_panel[MOST_ROWS][PANEL], *logits = of_panel[0];
                tile(buffer(c, 0), l, g, panel, 0, logits, PANEL);
                for (int row = g.row; row < g.row + g.rows; row++, logits += PANEL) {
                    if (choice->logits) {
                        memcpy(choice->logits + (int64_t)row * l->out + first, logits, sizeof(float) * n);
                        continue;
                    }
                    if (choice->forced[row] >= 0) continue;
                    const int32_t *forbidden = choice->forbidden + choice->begin[row];
                    int count = choice->begin[row + 1] - choice->begin[row], low = 0, high = count, scored = choice->scored[row];
                    while (low < high) { /* the first from here on */
                        int middle = (low + high) / 2;
                        if (forbidden[middle] < first) low = middle + 1;
                        else high = middle;
                    }
                    if (low < count && forbidden[low] < first + n) {
                        if (scored && choice->before[row]) {
                            find(&found[row], logits, first, n, 0, 1);
                            scored = 0;
                        }
                        for (; low < count && forbidden[low] < first + n; low++) logits[forbidden[low] - first] = -INFINITY;
                    }
                    find(&found[row], logits, first, n, choice->best, scored);
                }
            }
        }
    }
    barrier(c);
    if (choice->logits) return;
    int row;
    share(rows, c->threads, number, &row, &end);
    for (; row < end; row++) answer(c, row, chunks);
    barrier(c);
}

/* ---- a step, and an encoding ---- */

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* All layers, from the embedding on: ``x`` becomes what the last linear layer reads. */
static void layers(Context *c, int number, const Stack *s) {
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

static void step(Context *c, int number) {
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

static void encode(Context *c, int number) {
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
    share(heads, c->threads, number, &first, &last); /* tokens of one head share bytes that are written together */
    for (int h = first; h < last; h++)
        for (int row = 0, t = 0; row < rows; row++) {
            while (c->starts[t + 1] <= row) t++;
            int at = row - c->starts[t], room = (c->starts[t + 1] - c->starts[t] + 15) / 16 * 16;
            float *scales = (float *)(c->cross[t] + (int64_t)heads * room * padded);
            int64_t to = (int64_t)h * room;
            scales[to + at] = keep(c->middle + row * wide + h * d->head_size, c->cross[t] + to * padded, d->head_size, at,
                                   h / d->heads % 2);
        }
}

/* ---- a classification ---- */

#define MOST_VALUE 1023

/* What a thread attends with to ``n`` tokens of a text. A head's keys are a linear layer's weights. */
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
    float most;         /* 2^most is the highest share: so sums of shares times values are no more than an int32 holds */
    int n;
} Attention;

INLINE int padded_values(int n) { return (n + 31) / 32 * 32; }

/* Lays out ``h`` in ``memory``, NULL to see how much that is; returns the bytes. */
static int64_t lay_attention(Attention *h, const Stack *s, int n, char *memory) {
    int64_t keys = filled(n), size = s->head_size, bytes = 0;
#define LAY(field, count) h->field = (void *)(memory + bytes), bytes += filled(sizeof(*h->field) * (int64_t)(count))
    LAY(keys, keys * ((size + 3) / 4 * 4));
    LAY(key_scale, keys);
    LAY(zeros, keys);
    LAY(key_offset, keys);
    LAY(values, (keys / 2) * padded_values(size));
    LAY(value_scale, padded_values(size));
    LAY(scores, MOST_ROWS * keys);
    LAY(shares, MOST_ROWS * keys);
    LAY(queries.quantized, MOST_ROWS * filled(size));
    LAY(queries.step, MOST_ROWS);
    h->layer = (Linear){h->keys, h->key_scale, h->key_offset, h->zeros, s->head_size, n, 0};
    h->most = log2f(fminf(32767.0f, (float)(INT32_MAX / MOST_VALUE / n)));
    h->n = n;
    return bytes;
}

static int64_t attention_room(const Stack *s, int positions) {
    Attention h;
    return lay_attention(&h, s, positions, NULL);
}

static Attention attention_of(Context *c, int number, const Stack *s, int n) {
    Attention h;
    lay_attention(&h, s, n, (char *)c->scores[number]);
    memset(h.zeros, 0, sizeof(float) * filled(n));
    return h;
}

/* Keys with a scale each, as S8; values with one for each of their places, as S16. */
static void take_head(Attention *h, const Stack *s, const float *key, const float *value, int64_t wide) {
    int size = s->head_size, quads = (size + 3) / 4, padded = padded_values(size), n = h->n;
    int32_t *panels = (int32_t *)h->keys, four[64] = {0};
    for (int j = 0; j < filled(n); j++) {
        const float *k = key + j * wide;
        if (j < n) {
            __m512i sum = _mm512_setzero_si512();
            float highest = largest_of(k, size);
            __m512 inverse = _mm512_set1_ps(highest > 0 ? 127.0f / highest : 0.0f);
            for (int i = 0; i < size; i += 16) {
                __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(part(k, i, size), inverse));
                sum = _mm512_add_epi32(sum, x);
                _mm_storeu_si128((__m128i *)((int8_t *)four + i), _mm512_cvtsepi32_epi8(x));
            }
            h->key_scale[j] = highest / 127.0f;
            h->key_offset[j] = 128 * _mm512_reduce_add_epi32(sum);
        } else {
            memset(four, 0, sizeof(four));
            h->key_scale[j] = 0.0f;
            h->key_offset[j] = 0;
        }
        for (int i = 0; i < quads; i++) panels[((int64_t)(j / PANEL) * quads + i) * PANEL + j % PANEL] = four[i];
    }
    for (int i = 0; i < padded; i += 16) {
        __m512 most = _mm512_setzero_ps();
        for (int j = 0; j < n; j++) most = _mm512_max_ps(most, _mm512_abs_ps(part(value + j * wide, i, size)));
        __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ);
        __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(MOST_VALUE), most);
        _mm512_storeu_ps(h->value_scale + i, _mm512_div_ps(most, _mm512_set1_ps(MOST_VALUE)));
        for (int j = 0; j < n; j += 2) {
            __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(part(value + j * wide, i, size), inverse)), b = _mm512_setzero_si512();
            if (j + 1 < n) b = _mm512_cvtps_epi32(_mm512_mul_ps(part(value + (j + 1) * wide, i, size), inverse));
            a = _mm512_or_si512(_mm512_and_si512(a, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(b, 16));
            _mm512_storeu_si512(h->values + (int64_t)(j / 2) * padded + i, a);
        }
    }
}

/* What the exponents ``scores`` of 2 give, the highest one 2^``most``; returns the sum. */
INLINE int take_shares(float *scores, int16_t *shares, int n, float most) {
    __m512 highest = _mm512_set1_ps(-INFINITY);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16) highest = _mm512_mask_max_ps(highest, tail(n - i), highest, _mm512_loadu_ps(scores + i));
    highest = _mm512_set1_ps(_mm512_reduce_max_ps(highest) - most);
    int last = (n - 1) / 16 * 16;
    _mm512_mask_storeu_ps(scores + last, ~tail(n - last), _mm512_set1_ps(-1e9f));
    for (int i = 0; i < n; i += 16) {
        __m512i share_ = _mm512_cvtps_epi32(power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + i), highest)));
        sum = _mm512_add_epi32(sum, share_);
        _mm256_storeu_si256((__m256i *)(shares + i), _mm512_cvtepi32_epi16(share_));
    }
    return _mm512_reduce_add_epi32(sum);
}

/* ``rows`` queries, MOST_ROWS at most, of the text's tokens from ``from`` on, in the head that was taken; what they find goes
 * to ``out``. */
static void attend_head(Attention *h, const Stack *s, int head, const float *query, int64_t wide, int from, int rows,
                        float *out, int64_t out_wide) {
    int size = s->head_size, padded = padded_values(size), n = h->n;
    int64_t keys = filled(n), pairs = (n + 1) / 2;
    const float *bias = s->bias ? s->bias + (int64_t)head * s->distances : NULL;
    float sums[MOST_ROWS];
    for (int r = 0; r < rows; r++) give_row(h->queries, &h->layer, r, query + r * wide, s->scale * 1.44269504f);
    for (int panel = 0; panel < keys / PANEL; panel++) {
        tile(h->queries, &h->layer, group(rows, 0), panel, 0, h->scores + panel * PANEL, keys);
    }
    for (int r = 0; r < rows; r++) {
        float *scores = h->scores + r * keys;
        for (int t = 0; bias && t < n; t++) {
            int d = t - (from + r) + s->zero_distance;
            scores[t] += bias[d < 0 ? 0 : d >= s->distances ? s->distances - 1 : d] * 1.44269504f;
        }
        sums[r] = 1.0f / (float)take_shares(scores, h->shares + r * keys, n, h->most);
    }
    for (int i = 0; i < padded; i += 32) {
        __m512i sum[MOST_ROWS][2];
        for (int r = 0; r < MOST_ROWS; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
        const int32_t *v = h->values + i;
        for (int j = 0; j < pairs; j++, v += padded) {
            __m512i v0 = _mm512_load_si512(v), v1 = _mm512_load_si512(v + 16);
            for (int r = 0; r < MOST_ROWS; r++) {
                int32_t two;
                memcpy(&two, h->shares + r * keys + 2 * j, 4);
                __m512i p = _mm512_set1_epi32(two);
                sum[r][0] = _mm512_dpwssd_epi32(sum[r][0], p, v0);
                sum[r][1] = _mm512_dpwssd_epi32(sum[r][1], p, v1);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < 2; j++) {
                int at = i + 16 * j;
                __m512 worth = _mm512_mul_ps(_mm512_loadu_ps(h->value_scale + at), _mm512_set1_ps(sums[r]));
                if (at < size)
                    _mm512_mask_storeu_ps(out + r * out_wide + at, tail(size - at),
                                          _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][j]), worth));
            }
    }
}

/* Rows ``first`` to ``last`` of all attend; what they find takes the place of their queries. */
static void attend_rows(Context *c, int number, const Stack *s, float *packed, int first, int last) {
    int size = s->head_size, width = s->heads * size, text = 0;
    int64_t wide = filled(3 * width);
    while (c->starts[text + 1] <= first) text++;
    for (; text < c->texts && c->starts[text] < last; text++) {
        int start = c->starts[text], n = c->starts[text + 1] - start;
        int begin = first > start ? first : start, end = last < start + n ? last : start + n;
        Attention h = attention_of(c, number, s, n);
        for (int head = 0; head < s->heads; head++) {
            float *query = packed + head * size;
            const float *key = query + start * wide + width;
            take_head(&h, s, key, key + width, wide);
            for (int number = 0; number < groups_of(end - begin); number++) {
                Group g = group(end - begin, number);
                float *q = query + (begin + g.row) * wide;
                attend_head(&h, s, head, q, wide, begin + g.row - start, g.rows, q, wide);
            }
        }
    }
}

/* A layer's rows ``first`` to ``last`` once they have attended, as far as the next layer's input. */
static void finish_rows(Context *c, const Stack *s, const Layer *l, const float *packed, int first, int last) {
    int64_t hidden = filled(s->hidden), wide = filled(3 * s->heads * s->head_size), inner = filled(l->up.out);
    Rows own = {c->given[1] + first * c->widest, c->quantized[1] + first * c->widest, c->step[1] + first};
    float *x = c->x + first * hidden, *middle = c->middle + first * inner;
    int rows = last - first;
    for (int r = 0; r < rows; r++) give_row(own, &l->out, r, packed + (first + r) * wide, 1.0f);
    linear_of(own, &l->out, rows, 0, (int)hidden / PANEL, (Then){.add = 1, .out = x});
    for (int r = 0; r < rows; r++) {
        normalize(&l->attention_norm, x + r * hidden, x + r * hidden, s->hidden);
        give_row(own, &l->up, r, x + r * hidden, 1.0f);
    }
    linear_of(own, &l->up, rows, 0, (int)inner / PANEL, (Then){.activation = s->activation, .out = middle});
    for (int r = 0; r < rows; r++) give_row(own, &l->down, r, middle + r * inner, 1.0f);
    linear_of(own, &l->down, rows, 0, (int)hidden / PANEL, (Then){.add = 1, .out = x});
    for (int r = 0; r < rows; r++) {
        normalize(&l->feed_forward_norm, x + r * hidden, x + r * hidden, s->hidden);
        give_row(buffer(c, 0), &l[1].qkv, first + r, x + r * hidden, 1.0f);
    }
}

static void look_up(Context *c, const Stack *s, int row, int64_t token, int position) {
    float *x = c->x + (int64_t)row * filled(s->hidden);
    const int8_t *values = s->embedding + token * s->hidden;
    const float *positions = s->positions + (int64_t)position * s->hidden;
    __m512 scale = _mm512_set1_ps(s->embedding_scale[token]);
    for (int i = 0; i < s->hidden; i += 16) {
        __m512i v = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(tail(s->hidden - i), values + i));
        _mm512_storeu_ps(x + i, _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), scale, part(positions, i, s->hidden)));
    }
    normalize(&s->embedding_norm, x, x, s->hidden);
    give_row(buffer(c, 0), &s->layer->qkv, row, x, 1.0f);
}

/* The last layer, of which the first token of each text is all that is wanted, and the classifier's own layers. Threads
 * share the panels here. */
static void finish_texts(Context *c, int number, const Stack *s, float *packed) {
    const Layer *l = &s->layer[s->layers - 1];
    int size = s->head_size, width = s->heads * size, first, last, texts = c->texts;
    int64_t hidden = filled(s->hidden), wide = filled(3 * width), read = filled(l->qkv.in), given = filled(width);
    share(filled(width) / PANEL, c->threads, number, &first, &last);
    for (int text = 0; text < texts; text++) {
        int row = c->starts[text];
        Rows from = {c->given[0] + row * read, c->quantized[0] + row * read, c->step[0] + row};
        linear_of(from, &l->qkv, 1, first, last, (Then){.out = c->query + text * wide});
    }
    barrier(c);
    share(texts * s->heads, c->threads, number, &first, &last);
    for (int unit = first; unit < last; unit++) {
        int text = unit / s->heads, head = unit % s->heads, start = c->starts[text], n = c->starts[text + 1] - start;
        Attention h = attention_of(c, number, s, n);
        const float *key = packed + start * wide + width + head * size;
        take_head(&h, s, key, key + width, wide);
        attend_head(&h, s, head, c->query + text * wide + head * size, wide, 0, 1, c->given[0] + text * given + head * size,
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

/* Each thread takes some of the rows through a layer, and meets the others where they attend. */
static void classify(Context *c, int number) {
    const Stack *s = c->encoder;
    int first, last, width = s->heads * s->head_size, text = 0, panels = filled(3 * width) / PANEL;
    int64_t wide = filled(3 * width), read = filled(s->hidden);
    share(c->rows, c->threads, number, &first, &last);
    for (int row = first; row < last; row++) {
        while (c->starts[text + 1] <= row) text++;
        look_up(c, s, row, c->ids[row], row - c->starts[text]);
    }
    for (int i = 0; i < s->layers; i++) {
        int end = i == s->layers - 1;
        float *packed = c->packed + (i % 2) * c->capacity * wide; /* while others still read the last layer's */
        Rows from = {c->given[0] + first * read, c->quantized[0] + first * read, c->step[0] + first};
        linear_of(from, &s->layer[i].qkv, last - first, end ? width / PANEL : 0, panels, (Then){.out = packed + first * wide});
        barrier(c);
        if (end) finish_texts(c, number, s, packed);
        else if (first < last) {
            attend_rows(c, number, s, packed, first, last);
            finish_rows(c, s, &s->layer[i], packed, first, last);
        }
    }
}

/* ---- what native.py calls ---- */

static void *room(void *old, int64_t bytes) {
    void *new = NULL;
    free(old);
    if (posix_memalign(&new, 64, bytes < 64 ? 64 : bytes)) return NULL;
    memset(new, 0, bytes);
    return new;
}

/* Scratch for ``rows`` rows in ``stack``, and scores of ``positions``. Returns 0 when there is no memory. */
static int reserve(Context *c, int rows, int positions) {
    if (rows > c->capacity) {
        int64_t hidden = 0, packed = 0, query = 0, middle = 0, given = 0;
        for (int i = 0; i < 2; i++) {
            const Stack *s = i ? c->decoder : c->encoder;
            if (!s) continue;
            int64_t width = (int64_t)s->heads * s->head_size, inner = filled(s->layer->up.out);
#define MOST(a, b) if ((a) < (b)) a = (b)
            MOST(hidden, filled(s->hidden));
            MOST(packed, filled(3 * width));
            MOST(query, filled(width));
            MOST(middle, inner);
            MOST(given, filled(s->hidden));
            MOST(given, filled(width));
            MOST(given, inner);
        }
        MOST(middle, filled(c->encoder->last.out));
        if (c->head) {
            query = packed; /* the queries of such a row */
            packed *= 2;    /* layers take turns at two */
            MOST(middle, filled(c->head->out.out));
            MOST(given, filled(c->encoder->last.out));
            c->widest = given;
        }
        c->capacity = 0;
        int64_t size = sizeof(float) * rows;
        c->x = room(c->x, size * hidden);
        c->normed = room(c->normed, size * hidden);
        c->packed = room(c->packed, size * packed);
        c->query = room(c->query, size * query);
        c->middle = room(c->middle, size * middle);
        int there = c->x && c->normed && c->packed && c->query && c->middle;
        for (int i = 0; i < 2; i++) {
            c->given[i] = room(c->given[i], size * given);
            c->quantized[i] = room(c->quantized[i], rows * given);
            c->step[i] = room(c->step[i], size);
            there = there && c->given[i] && c->quantized[i] && c->step[i];
        }
        if (!there) return 0;
        c->capacity = rows;
    }
    if (positions > c->positions) {
        int floats = padded_head(c->encoder->head_size) + QUERIES; /* of a position: encoder_attention's */
        MOST(floats, 2 * MOST_HEADS + MOST_HEADS / 2);             /* and those of attend_heads */
        int64_t most = sizeof(float) * floats * ((positions + 15) / 16 * 16);
        c->positions = 0;
        for (int i = 0; i < c->threads; i++)
            if (!(c->scores[i] = room(c->scores[i], c->head ? attention_room(c->encoder, positions) : most)))
                return 0;
        c->positions = positions;
    }
    return 1;
}

Context *deploykit_new(const Stack *encoder, const Stack *decoder, int threads) {
    Context *c = calloc(1, sizeof(Context));
    if (!c) return NULL;
    c->encoder = encoder;
    c->decoder = decoder;
    c->threads = threads;
    c->scores = calloc(threads, sizeof(float *));
    c->thread = calloc(threads, sizeof(pthread_t));
    pthread_mutex_init(&c->mutex, NULL);
    pthread_cond_init(&c->wake, NULL);
    for (int i = 1; i < threads; i++) {
        Thread *t = malloc(sizeof(Thread));
        *t = (Thread){c, i};
        if (pthread_create(&c->thread[i], NULL, serve, t)) {
            free(t);
            c->threads = i;
            break;
        }
    }
    return c;
}

void deploykit_free(Context *c) {
    c->stop = 1;
    run(c, NULL);
    for (int i = 1; i < c->threads; i++) pthread_join(c->thread[i], NULL);
    for (int i = 0; i < c->threads; i++) free(c->scores[i]);
    for (int i = 0; i < 2; i++) {
        free(c->given[i]);
        free(c->quantized[i]);
        free(c->step[i]);
    }
    free(c->x);
    free(c->normed);
    free(c->packed);
    free(c->query);
    free(c->middle);
    free(c->found);
    free(c->scores);
    free(c->thread);
    pthread_mutex_destroy(&c->mutex);
    pthread_cond_destroy(&c->wake);
    free(c);
}

/* Of the time in steps, what the vocabulary took: from 0 to 1. */
double deploykit_projection_share(const Context *c) { return c->stepping ? (double)c->choosing / (double)c->stepping : 0.0; }

#define TOKENS_PER_CLASSIFICATION 256 /* of a thread: their weights are read once for all of them */

Context *deploykit_new_classifier(const Stack *encoder, const Head *head, int threads) {
    Context *c = deploykit_new(encoder, NULL, threads);
    if (c) c->head = head;
    return c;
}

/* ids of ``texts`` texts one after another; ``logits``: [texts][labels]. Returns 0 when there is no memory. */
int deploykit_classify(Context *c, const int64_t *ids, const int32_t *starts, int texts, float *logits) {
    int most = TOKENS_PER_CLASSIFICATION * c->threads, longest = 0, rows = 0, labels = c->head->out.out;
    int32_t relative[TOKENS_PER_CLASSIFICATION + 1];
    for (int first = 0, last; first < texts; first = last) {
        relative[0] = rows = 0;
        for (last = first; last < texts && last - first < TOKENS_PER_CLASSIFICATION; last++) {
            int n = starts[last + 1] - starts[last];
            if (last > first && rows + n > most) break;
            rows += n;
            relative[last - first + 1] = rows;
            if (n > longest) longest = n;
        }
        if (!reserve(c, rows, longest)) return 0;
        c->ids = ids + starts[first];
        c->starts = relative;
        c->texts = last - first;
        c->rows = rows;
        c->logits = logits + (int64_t)first * labels;
        run(c, classify);
    }
    return 1;
}

/* ids of ``texts`` texts one after another; ``cross``: where to write what each gives. Returns 0 when there is no memory. */
int deploykit_encode(Context *c, const int64_t *ids, const int32_t *starts, int texts, int8_t **cross) {
    int longest = 0;
    for (int i = 0; i < texts; i++)
        if (starts[i + 1] - starts[i] > longest) longest = starts[i + 1] - starts[i];
    if (!reserve(c, starts[texts], longest)) return 0;
    c->ids = ids;
    c->starts = starts;
    c->texts = texts;
    c->cross = cross;
    c->rows = starts[texts];
    run(c, encode);
    return 1;
}

/* One token of each row. Returns 0 when there is no memory. */
int deploykit_step(Context *c, const Batch *batch, const Choice *choice) {
    int longest = batch->cache_positions;
    for (int i = 0; i < batch->rows; i++)
        if (batch->source[i] > longest) longest = batch->source[i];
    if (!reserve(c, batch->rows, longest)) return 0;
    if (batch->rows > c->best_rows && !choice->logits) {
        c->best_rows = 0;
        if (!(c->found = room(c->found, (int64_t)sizeof(Found) * CHUNKS * batch->rows))) return 0;
        c->best_rows = batch->rows;
    }
    c->batch = batch;
    c->choice = choice;
    c->rows = batch->rows;
    run(c, step);
    return 1;
}

/* Greedy steps until a row ends, or the most that there may be. Returns how many, or 0 when there is no memory. */
int deploykit_greedy(Context *c, const Batch *batch, const Choice *choice, const Greedy *greedy) {
    int ended = 0;
    for (int n = 1;; n++) {
        if (!deploykit_step(c, batch, choice)) return 0;
        for (int row = 0; row < batch->rows; row++) {
            int64_t token = choice->ids[row], length = greedy->lengths[row]++;
            greedy->tokens[row * greedy->stride + length] = token;
            if (choice->scored[row]) greedy->sums[row] += choice->values[row];
            batch->tokens[row] = token;
            batch->past[row]++;
            ended |= greedy->ends[token] || length + 1 >= greedy->limits[row];
        }
        if (ended || n == greedy->most) return n;
    }
}

/* ---- beam search ---- */

#define MOST_BEAMS 32
#define NEVER -1e9 /* Hugging Face's "cannot be chosen" */

typedef struct {
    float score;
    int32_t parent, ends;
    int64_t token;
} Continuation;

static void finish(Beam *b, float score, const int64_t *tokens, int length, int64_t last) {
    int at = b->finished < b->beams ? b->finished++ : b->beams;
    while (at > 0 && b->scores[at - 1] < score) at--; /* after those of equal score */
    if (at == b->beams) return;
    int moved = b->finished - 1 - at;
    memmove(b->scores + at + 1, b->scores + at, sizeof(float) * moved);
    memmove(b->lengths + at + 1, b->lengths + at, sizeof(int32_t) * moved);
    memmove(b->tokens + (at + 1) * b->stride, b->tokens + at * b->stride, sizeof(int64_t) * moved * b->stride);
    b->scores[at] = score;
    b->lengths[at] = length;
    memcpy(b->tokens + at * b->stride, tokens + 1, sizeof(int64_t) * (length - 1));
    b->tokens[at * b->stride + length - 1] = last;
}

/* What ``Beam.advance`` of search.py says: which hypotheses go on. Returns whether the search is over. */
static int advance(Beam *b, Continuation *best, int count, const Search *s, const int64_t *rows, int length, Continuation *going) {
    int beams = b->beams, among_first = 0, all = 1, n = 0;
    double penalty = pow(length, b->length_penalty);
    for (int i = 0; i < count; i++) {
        best[i].ends = length + 1 >= b->max_length || s->ends[best[i].token];
        all &= best[i].ends;
        if (i < beams) among_first |= best[i].ends;
    }
    if (among_first && b->improvable && !(b->finished == beams && b->early_stopping == 1))
        for (int i = 0; i < beams; i++)
            if (best[i].ends)
                finish(b, (float)((double)best[i].score / penalty), s->tokens + rows[best[i].parent] * s->stride, length,
                       best[i].token);
    for (int ends = 0; ends < 2; ends++)
        for (int i = 0; i < count && n < beams; i++)
            if (best[i].ends == ends) going[n++] = best[i];
    double first = (double)going[0].score + (going[0].ends ? NEVER : 0.0);
    if (b->improvable && b->finished == beams) {
        int longest = b->early_stopping == 2 && b->length_penalty > 0 ? b->max_length - 1 : length;
        b->improvable = (float)(first / pow(longest, b->length_penalty)) > b->scores[beams - 1];
    }
    return all || !b->improvable || (b->finished == beams && b->early_stopping == 1);
}

/* The best continuations of a sentence's hypotheses; of equals those of the better hypothesis come first. */
static void continuations(const Search *s, const Choice *choice, const int64_t *rows, int beams, Continuation *best) {
    int found = 0;
    for (int parent = 0; parent < beams; parent++)
        for (int j = 0; j < choice->best; j++) {
            int64_t from = rows[parent] * choice->best + j;
            float score = s->sums[rows[parent]] + choice->values[from];
            int at = found < s->candidates ? found++ : s->candidates;
            while (at > 0 && best[at - 1].score < score) at--;
            if (at == s->candidates) break; /* those that follow are no better */
            memmove(best + at + 1, best + at, sizeof(Continuation) * (found - 1 - at));
            best[at] = (Continuation){.score = score, .parent = parent, .token = choice->ids[from]};
        }
}

/* Each hypothesis that goes on takes its parent's row, or, where a better one has it, that of one that does not. */
static void rearrange(const Batch *b, const Search *s, int64_t *rows, int beams, int length, const Continuation *going) {
    int64_t now[MOST_BEAMS];
    int taken[MOST_BEAMS] = {0}, spare = 0;
    for (int i = 0; i < beams; i++) taken[going[i].parent] = 1;
    int kept[MOST_BEAMS] = {0};
    for (int i = 0; i < beams; i++) {
        int parent = going[i].parent;
        int64_t source = rows[parent];
        if (!kept[parent]) {
            kept[parent] = 1;
            now[i] = source;
            continue;
        }
        while (taken[spare]) spare++;
        now[i] = rows[spare++];
        memcpy(s->tokens + now[i] * s->stride, s->tokens + source * s->stride, sizeof(int64_t) * length);
        memcpy(b->tables + now[i] * b->table, b->tables + source * b->table, sizeof(int32_t) * length);
    }
    for (int i = 0; i < beams; i++) {
        int64_t row = now[i];
        rows[i] = row;
        s->tokens[row * s->stride + length] = going[i].token;
        s->lengths[row] = length + 1;
        s->sums[row] = (float)((double)going[i].score + (going[i].ends ? NEVER : 0.0));
        b->tokens[row] = going[i].token;
    }
}

/* Steps of beam search until a sentence's is over, or the most that there may be. Returns how many, or 0 when there is no
 * memory. */
int deploykit_beams(Context *c, const Batch *batch, const Choice *choice, const Search *search) {
    int over = 0;
    for (int n = 1;; n++) {
        if (!deploykit_step(c, batch, choice)) return 0;
        for (int row = 0; row < batch->rows; row++) batch->past[row]++;
        for (int i = 0; i < search->sentences; i++) {
            Beam *b = search->beams[i];
            int64_t *rows = search->rows + (int64_t)i * b->beams;
            Continuation best[MOST_BEST * 2 + 1], going[MOST_BEAMS];
            int length = (int)search->lengths[rows[0]];
            continuations(search, choice, rows, b->beams, best);
            b->done = advance(b, best, search->candidates, search, rows, length, going);
            if (b->done) over = 1;
            else rearrange(batch, search, rows, b->beams, length, going);
        }
        if (over || n == search->most) return n;
    }
}
