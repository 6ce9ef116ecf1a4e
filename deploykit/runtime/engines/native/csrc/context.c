/* The memory and threads of a model, and functions that classifier.py and translator.py call; search.c has the others. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if defined(_WIN32)
#include <malloc.h>

static void *aligned(int64_t bytes) { return _aligned_malloc(bytes, 64); }
void give_up(void *room) { _aligned_free(room); }
#else
static void *aligned(int64_t bytes) {
    void *new;
    return posix_memalign(&new, 64, bytes) ? NULL : new;
}
void give_up(void *room) { free(room); }
#endif

void *room(void *old, int64_t bytes) {
    give_up(old);
    void *new = aligned(bytes < 64 ? 64 : bytes);
    return new ? memset(new, 0, bytes) : NULL;
}

/* Allocate scratch memory for ``rows`` rows in ``stack``, and scores of ``positions``. Returns 0 if out of memory. */
int reserve(Context *c, int rows, int positions) {
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
            query = packed; /* the queries of the widest row */
            packed *= 2;    /* layers alternate between two */
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
            c->quantized[i] = room(c->quantized[i], (rows + TILE_UNIT) * given);
            c->step[i] = room(c->step[i], size);
            there = there && c->given[i] && c->quantized[i] && c->step[i];
        }
        if (!there) return 0;
        c->capacity = rows;
    }
    if (positions > c->positions) {
        int floats = padded_head(c->encoder->head_size) + QUERIES; /* per position, for attend_text */
        MOST(floats, 3 * MOST_HEADS);                              /* and for attend_heads */
        int64_t most = sizeof(float) * floats * ((positions + 15) / 16 * 16);
        c->positions = 0;
        for (int i = 0; i < c->threads; i++)
            if (!(c->scores[i] = room(c->scores[i], c->head ? attention_room(c->encoder, positions) : most)))
                return 0;
        c->positions = positions;
    }
    return 1;
}

API Context *deploykit_new(const Stack *encoder, const Stack *decoder, int threads) {
    Context *c = calloc(1, sizeof(Context));
    if (!c) return NULL;
    c->kernels = chosen_kernels();
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

API void deploykit_free(Context *c) {
    c->stop = 1;
    run(c, NULL);
    for (int i = 1; i < c->threads; i++) pthread_join(c->thread[i], NULL);
    for (int i = 0; i < c->threads; i++) give_up(c->scores[i]);
    for (int i = 0; i < 2; i++) {
        give_up(c->given[i]);
        give_up(c->quantized[i]);
        give_up(c->step[i]);
    }
    give_up(c->x);
    give_up(c->normed);
    give_up(c->packed);
    give_up(c->query);
    give_up(c->middle);
    give_up(c->found);
    free(c->scores);
    free(c->thread);
    pthread_mutex_destroy(&c->mutex);
    pthread_cond_destroy(&c->wake);
    free(c);
}

/* The vocabulary's share of the time in steps, from 0 to 1. */
API double deploykit_projection_share(const Context *c) { return c->stepping ? (double)c->choosing / (double)c->stepping : 0.0; }

API Context *deploykit_new_classifier(const Stack *encoder, const Head *head, int threads) {
    Context *c = deploykit_new(encoder, NULL, threads);
    if (c) c->head = head;
    return c;
}

/* Compute deploykit_classify for so many tokens that each thread gets several whole texts. */
static int classify_texts(Context *c, const int64_t *ids, const int32_t *places, const int32_t *starts, int texts, float *logits) {
    int longest = TOKENS_PER_THREAD;
    for (int i = 0; i < texts; i++)
        if (starts[i + 1] - starts[i] > longest) longest = starts[i + 1] - starts[i];
    if (!reserve(c, longest * c->threads, longest)) return 0;
    c->ids = ids;
    c->places = places;
    c->starts = starts;
    c->texts = texts;
    c->logits = logits;
    c->next = 0;
    c->apart = longest;
    run(c, classify);
    c->apart = 0;
    return 1;
}

/* ids of ``texts`` texts one after another; ``logits``: [texts][labels], or of a head of every token [tokens][labels].
 * Returns 0 when there is no memory. */
API int deploykit_classify(Context *c, const int64_t *ids, const int32_t *places, const int32_t *starts, int texts,
                           float *logits) {
    int most = TOKENS_PER_THREAD * c->threads, longest = 0, rows = 0, tokens = !c->head->out.weight;
    int32_t relative[TOKENS_PER_THREAD + 1];
    if (tokens && starts[texts] >= 4 * most) return classify_texts(c, ids, places, starts, texts, logits);
    for (int first = 0, last; first < texts; first = last) {
        relative[0] = rows = 0;
        for (last = first; last < texts && last - first < TOKENS_PER_THREAD; last++) {
            int n = starts[last + 1] - starts[last];
            if (last > first && rows + n > most) break;
            rows += n;
            relative[last - first + 1] = rows;
            if (n > longest) longest = n;
        }
        if (!reserve(c, rows, longest)) return 0;
        c->ids = ids + starts[first];
        c->places = places + starts[first];
        c->starts = relative;
        c->texts = last - first;
        c->rows = rows;
        c->logits = logits + (tokens ? (int64_t)starts[first] * c->encoder->last.out : (int64_t)first * c->head->out.out);
        run(c, classify);
    }
    return 1;
}

/* Encode ``texts`` texts with concatenated ids; ``cross``: where to write each one's result. Returns 0 if out of memory. */
API int deploykit_encode(Context *c, const int64_t *ids, const int32_t *starts, int texts, int8_t **cross) {
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

/* Decode one token of each row. Returns 0 if out of memory. */
API int deploykit_step(Context *c, const Batch *batch, const Choice *choice) {
    int longest = batch->cache_positions;
    for (int i = 0; i < batch->rows; i++)
        if (batch->source[i] > longest) longest = batch->source[i];
    if (!reserve(c, batch->rows, longest)) return 0;
    if (batch->rows > c->best_rows && choice->best) {
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

