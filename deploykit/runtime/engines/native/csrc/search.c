/* Greedy decoding and beam search: steps until a sentence ends. */
#include <math.h>
#include <string.h>

#include "native.h"

/* Run greedy steps until a row ends, at most ``most``. Returns the number of steps, or 0 if out of memory. */
API int deploykit_greedy(Context *c, const Batch *batch, const Choice *choice, const Greedy *greedy) {
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

#define MOST_BEAMS 32
#define NEVER -1e9 /* Hugging Face's score of a forbidden token */

typedef struct {
    float score;
    int32_t parent, ends;
    int64_t token;
} Continuation;

static void finish(Beam *b, float score, const int64_t *tokens, int length, int64_t last) {
    int at = b->finished < b->beams ? b->finished++ : b->beams;
    while (at > 0 && b->scores[at - 1] < score) at--; /* behind equal scores */
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

/* Choose the next hypotheses as ``Beam.advance`` in search.py does. Returns whether the search is over. */
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

/* Find the best continuations of a sentence's hypotheses; of equals, those of the better hypothesis come first. */
static void continuations(const Search *s, const Choice *choice, const int64_t *rows, int beams, Continuation *best) {
    int found = 0;
    for (int parent = 0; parent < beams; parent++)
        for (int j = 0; j < choice->best; j++) {
            int64_t from = rows[parent] * choice->best + j;
            float score = s->sums[rows[parent]] + choice->values[from];
            int at = found < s->candidates ? found++ : s->candidates;
            while (at > 0 && best[at - 1].score < score) at--;
            if (at == s->candidates) break; /* the rest are no better */
            memmove(best + at + 1, best + at, sizeof(Continuation) * (found - 1 - at));
            best[at] = (Continuation){.score = score, .parent = parent, .token = choice->ids[from]};
        }
}

/* Give each new hypothesis its parent's row, or the row of a dropped hypothesis if a better one has that row already. */
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

/* Run steps of beam search until a sentence is done, at most ``most``. Returns the number of steps, or 0 if out of
 * memory. */
API int deploykit_beams(Context *c, const Batch *batch, const Choice *choice, const Search *search) {
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
