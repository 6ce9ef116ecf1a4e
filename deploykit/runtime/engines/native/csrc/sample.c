/* Sample a token from logits, with the rules of runtime/token_distribution.py and runtime/penalties.py. */
#include <math.h>
#include <string.h>

#include "kernels.h"

/* Memory for values and positions, each for a whole vocabulary. */
typedef struct {
    float *shares, *values, *keys, *weights, *picked;
    int32_t *ids, *places;
    double *sums;
} Room;

static void swap(float *a, float *b) {
    float held = *a;
    *a = *b;
    *b = held;
}

/* The median of three values. */
static float middle(float a, float b, float c) { return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c)); }

/* Move the values over ``pivot``, or those that equal it, to the front, with their weights. Returns their number,
 * and adds their weights to ``sum``. */
static int move(float *x, float *weights, int n, float pivot, int equal, double *sum) {
    int moved = 0;
    for (int i = 0; i < n; i++)
        if (equal ? x[i] == pivot : x[i] > pivot) {
            *sum += (double)weights[i];
            swap(x + i, x + moved);
            if (weights != x) swap(weights + i, weights + moved);
            moved++;
        }
    return moved;
}

/* Return the largest value such that ``count`` values are no smaller, or ``share`` is reached by the weights of those that are
 * no smaller, whichever needs more: a quickselect. Changes the order of both. ``weights`` may be ``x``. */
static float boundary(float *x, float *weights, int n, int count, double share) {
    for (;;) {
        double sum = 0;
        float pivot = middle(x[0], x[n / 2], x[n - 1]);
        int over = move(x, weights, n, pivot, 0, &sum);
        if (over >= count && sum >= share && over) {
            n = over;
            continue;
        }
        int end = over + move(x + over, weights + over, n - over, pivot, 1, &sum);
        if (end == over || end == n || (end >= count && sum >= share)) return pivot; /* none is equal to a NaN */
        x += end, weights += end, n -= end, count -= end, share -= sum;
    }
}

/* Keep the ``count`` tokens with the highest logits, and those equal to the last. Returns the number kept. */
static int keep_best(const Kernels *k, const float *logits, int n, int count, Room r) {
    int width = n / 8 / count, found = 0, kept = 0;
    float limit = -INFINITY;
    if (width > 1) { /* at least that many logits reach the limit, and few others do */
        for (int i = 0; i < 8 * count; i++) r.values[i] = k->highest_of(logits + i * width, width);
        limit = boundary(r.values, r.values, 8 * count, count, -INFINITY);
    }
    found = k->find_over(logits, n, nextafterf(limit, -INFINITY), r.ids);
    if (found <= count) return found;
    for (int i = 0; i < found; i++) r.values[i] = logits[r.ids[i]];
    limit = boundary(r.values, r.values, found, count, -INFINITY);
    for (int i = 0; i < found; i++)
        if (logits[r.ids[i]] >= limit) r.ids[kept++] = r.ids[i];
    return kept;
}

/* Keep the positions of the smallest set of the largest shares that reaches ``top_p`` of the sum. Returns the number kept. */
static int keep_largest(const Kernels *k, int n, double top_p, Room r) {
    double total = 0, sum = 0;
    for (int i = 0; i < (n + SHARES - 1) / SHARES; i++) total += r.sums[i];
    /* The tokens below this mean share have no more than 1 - top_p together. */
    float mean = (float)((1 - top_p) * total / n);
    int found = k->find_over(r.shares, n, nextafterf(mean, -INFINITY), r.places), kept = 0, equal = 0, spare = 0;
    if (!found) return 0;
    for (int i = 0; i < found; i++) r.values[i] = r.shares[r.places[i]];
    float limit = boundary(r.values, r.values, found, 1, top_p * total);
    for (int i = 0; i < found; i++) {
        float share = r.shares[r.places[i]];
        if (share < limit) continue;
        sum += (double)share;
        equal += share == limit;
        r.places[kept++] = r.places[i];
    }
    double excess = sum - top_p * total;
    if (limit > 0 && excess >= (double)limit) spare = (int)fmin(equal - 1, excess / (double)limit);
    if (!spare) return kept;
    found = kept, kept = 0, equal -= spare;
    for (int i = 0; i < found; i++) { /* of equal ones, the lower ids stay */
        int32_t place = r.places[i];
        if (r.shares[place] != limit || equal-- > 0) r.places[kept++] = place;
    }
    return kept;
}

/* The information of a token, less that of the likeliest. */
static float information(float logit, float highest, double temperature) { return (float)((double)(highest - logit) / temperature); }

/* The distance of a token's information from ``mean``, the entropy: 0 is nearest. */
static float nearness(float informs, double mean) { return -fabsf((float)((double)informs - mean)); }

/* Of ``n`` positions, keep the fewest with the nearest information that reach ``typical_p`` of the sum. Returns the number kept. ``x``: logits. */
static int keep_typical(const float *x, float highest, double temperature, int n, double typical_p, Room r) {
    double total = 0, mean = 0;
    for (int i = 0; i < n; i++) {
        int32_t place = r.places[i];
        total += (double)r.shares[place];
        mean += (double)r.shares[place] * (double)information(x[place], highest, temperature);
    }
    mean /= total; /* the entropy, also less the information of the likeliest */
    for (int i = 0; i < n; i++) {
        int32_t place = r.places[i];
        r.keys[i] = nearness(information(x[place], highest, temperature), mean);
        r.weights[i] = r.shares[place];
    }
    float limit = boundary(r.keys, r.weights, n, 1, typical_p * total);
    int kept = 0;
    for (int i = 0; i < n; i++) {
        int32_t place = r.places[i];
        if (nearness(information(x[place], highest, temperature), mean) >= limit) r.places[kept++] = place;
    }
    return kept;
}

/* Sample one of ``n`` shares, those at ``places`` or, if that is NULL, all. Returns -1 if none is over 0. */
static int draw(const float *shares, const int32_t *places, int n, double uniform) {
    double total = 0, sum = 0;
    int last = -1;
    for (int i = 0; i < n; i++) total += (double)shares[places ? places[i] : i];
    for (int i = 0; i < n; i++) {
        float share = shares[places ? places[i] : i];
        if (!(share > 0)) continue;
        sum += (double)share;
        last = i;
        if (sum > uniform * total) break;
    }
    return last;
}

/* Return a logit if bit ``k`` of ``allowed`` is 1, else -inf, without a branch: masks in the middle of a text are irregular. */
static float masked(float logit, unsigned allowed, int k) {
    uint32_t bits, keep = 0u - (allowed >> k & 1u);
    memcpy(&bits, &logit, sizeof bits);
    bits = (bits & keep) | (0xff800000u & ~keep);
    memcpy(&logit, &bits, sizeof bits);
    return logit;
}

/* Write ``n`` logits to ``out``, with -inf where the token's bit in ``allowed``, the lowest of a byte first, is 0, or there is none. */
API void deploykit_mask(const float *logits, int32_t n, const uint8_t *allowed, int32_t bytes, float *out) {
    int whole = n / 8 < bytes ? n / 8 : bytes;
    for (int i = 0; i < whole; i++)
        for (int k = 0; k < 8; k++) out[8 * i + k] = masked(logits[8 * i + k], allowed[i], k);
    for (int i = 8 * whole; i < n; i++) out[i] = masked(logits[i], i / 8 < bytes ? allowed[i / 8] : 0, i % 8);
}

/* The tokens whose logits change, in this order: ``bias`` is added to those ``biased``, ``repetition`` divides the positive logits of
 * those ``seen`` and multiplies the negative ones, and ``presence`` and ``frequency`` times their ``counts`` are subtracted from those
 * ``answered``. ``before`` has room for the old values of all. */
typedef struct {
    const int32_t *biased, *seen, *answered;
    const float *bias, *counts;
    float *before;
    int32_t biased_count, seen_count, answered_count;
    float repetition, presence, frequency;
} PenalizedTokens;

API void deploykit_penalize(float *logits, const PenalizedTokens *t) {
    float *before = t->before;
    for (int i = 0; i < t->biased_count; i++) {
        float *x = logits + t->biased[i];
        *before++ = *x;
        *x += t->bias[i];
    }
    for (int i = 0; i < t->seen_count; i++) {
        float *x = logits + t->seen[i];
        *before++ = *x;
        *x = *x < 0 ? *x * t->repetition : *x / t->repetition;
    }
    for (int i = 0; i < t->answered_count; i++) {
        float *x = logits + t->answered[i];
        *before++ = *x;
        *x -= t->presence + t->frequency * t->counts[i];
    }
}

/* Undo deploykit_penalize, from the last change to the first: a token may be in several lists. */
API void deploykit_unpenalize(float *logits, const PenalizedTokens *t) {
    const float *before = t->before + t->biased_count + t->seen_count + t->answered_count;
    for (int i = t->answered_count - 1; i >= 0; i--) logits[t->answered[i]] = *--before;
    for (int i = t->seen_count - 1; i >= 0; i--) logits[t->seen[i]] = *--before;
    for (int i = t->biased_count - 1; i >= 0; i--) logits[t->biased[i]] = *--before;
}

/* Return the bytes of memory that deploykit_draw needs for a vocabulary of ``n``. */
API int64_t deploykit_draw_room(int32_t n) { return 7 * sizeof(float) * (int64_t)n + sizeof(double) * (n / SHARES + 1); }

/* Sample a token of ``n``, with the rules in this order: temperature, top-k (0: none), top-p (1: none), min-p (0: none), typical-p
 * (1: none).
 * ``uniform`` is from [0, 1). Returns -1 if no logit is finite. */
API int32_t deploykit_draw(const float *logits, int32_t n, double temperature, int32_t top_k, double top_p, double min_p,
                           double typical_p, double uniform, void *room) {
    const Kernels *k = chosen_kernels();
    double *sums = room;
    float *shares = (float *)(sums + n / SHARES + 1);
    int64_t size = n;
    float *values = shares + size, *keys = values + size, *weights = keys + size, *picked = weights + size;
    Room r = {shares, values, keys, weights, picked, (int32_t *)(picked + size), (int32_t *)(picked + 2 * size), sums};
    const float *x = logits;
    int picks = top_k > 0 && top_k < n, kept = 0, first = 0, place;
    if (picks) {
        n = keep_best(k, logits, n, top_k, r);
        for (int i = 0; i < n; i++) r.picked[i] = logits[r.ids[i]];
        x = r.picked;
    }
    float highest = k->highest_of(x, n);
    if (!(highest > -INFINITY && highest < INFINITY)) return -1;
    temperature = fmax(temperature, 1e-30);
    k->shares_of(x, n, highest, (float)(1.44269504088896 / temperature), r.shares, r.sums);
    if (top_p < 1) {
        kept = keep_largest(k, n, top_p, r);
        int found = kept;
        kept = 0;
        for (int i = 0; i < found; i++)
            if ((double)r.shares[r.places[i]] >= min_p) r.places[kept++] = r.places[i];
    } else if (min_p > 0 || typical_p < 1) {
        kept = k->find_over(r.shares, n, min_p > 0 ? nextafterf((float)min_p, -INFINITY) : 0, r.places);
    } else { /* find the part of the vocabulary first */
        double total = 0, before = 0;
        int part = 0, parts = (n + SHARES - 1) / SHARES;
        for (int i = 0; i < parts; i++) total += r.sums[i];
        for (double left = uniform * total; part < parts - 1 && before + r.sums[part] <= left; part++) before += r.sums[part];
        while (part > 0 && !(r.sums[part] > 0)) before -= r.sums[--part];
        first = part * SHARES;
        r.places = NULL;
        kept = n - first < SHARES ? n - first : SHARES;
        uniform = (uniform * total - before) / r.sums[part];
    }
    if (typical_p < 1 && kept) kept = keep_typical(x, highest, temperature, kept, typical_p, r);
    place = draw(r.shares + first, r.places, kept, uniform);
    if (place < 0) return -1;
    place = r.places ? r.places[place] : first + place;
    return picks ? r.ids[place] : place;
}
