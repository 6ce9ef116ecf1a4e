/* Select tokens from the vocabulary. */
#include <math.h>
#include <string.h>

#include "kernels.h"

/* Sum 16 lanes in the order of all kernels: add the upper half to the lower, and repeat. */
static float sum_of_lanes(const float *lanes) {
    float sums[8];
    for (int i = 0; i < 8; i++) sums[i] = lanes[i] + lanes[i + 8];
    for (int width = 4; width; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0];
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
            if (f->highest > -INFINITY) sum = fmaf(sum_of_lanes(f->sums), expf(f->highest - highest), sum);
        }
        if (choice->scored[row]) log_sum = highest + logf(sum);
        for (; found < best; found++) { /* of equals take the first chunk's, which has the lower id */
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
    for (int64_t id = 0; found < best; id++) { /* fill the rest with forbidden tokens */
        int there = 0;
        for (int i = 0; i < found; i++) there |= ids[i] == id;
        if (there) continue;
        values[found] = -INFINITY;
        ids[found++] = id;
    }
}

void choose(Context *c, int number, const Stack *s) {
    const Linear *l = &s->last;
    const Choice *choice = c->choice;
    int rows = c->rows, panels = filled(l->out) / PANEL, chunks = (panels + 7) / 8 < CHUNKS ? (panels + 7) / 8 : CHUNKS;
    int groups = groups_of(rows, c->kernels->rows), mine, end;
    share(chunks, c->threads, number, &mine, &end);
    for (const int first_chunk = mine; mine < end; mine++) {
        int panel, last;
        Found *found = c->found + (int64_t)mine * rows;
        share(panels, chunks, mine, &panel, &last);
        for (int row = 0; row < rows && choice->best; row++) { /* start from the threshold of this thread's earlier chunks */
            float threshold = mine > first_chunk ? (found - rows)[row].threshold : -INFINITY;
            found[row].highest = -INFINITY;
            memset(found[row].sums, 0, sizeof(found[row].sums));
            found[row].threshold = threshold;
            found[row].found = 0;
        }
        for (; panel < last; panel++) {
            int first = panel * PANEL, n = l->out - first < PANEL ? l->out - first : PANEL;
            for (int number = 0; number < groups; number++) {
                Group g = group_of(c->kernels, rows, number);
                float of_panel[MOST_TILE_ROWS][PANEL], *logits = of_panel[0];
                c->kernels->tile(buffer(c, 0), l, g, panel, (Then){.out = logits}, PANEL);
                for (int row = g.row; row < g.row + g.rows; row++, logits += PANEL) {
                    if (choice->logits) memcpy(choice->logits + (int64_t)row * l->out + first, logits, sizeof(float) * n);
                    if (!choice->best || choice->forced[row] >= 0) continue;
                    const int32_t *forbidden = choice->forbidden + choice->begin[row];
                    int count = choice->begin[row + 1] - choice->begin[row], low = 0, high = count, scored = choice->scored[row];
                    while (low < high) { /* binary search for the first one from here on */
                        int middle = (low + high) / 2;
                        if (forbidden[middle] < first) low = middle + 1;
                        else high = middle;
                    }
                    if (low < count && forbidden[low] < first + n) {
                        if (scored && choice->before[row]) {
                            c->kernels->find(&found[row], logits, first, n, 0, 1);
                            scored = 0;
                        }
                        for (; low < count && forbidden[low] < first + n; low++) logits[forbidden[low] - first] = -INFINITY;
                    }
                    c->kernels->find(&found[row], logits, first, n, choice->best, scored);
                }
            }
        }
    }
    barrier(c);
    if (!choice->best) return;
    int row;
    share(rows, c->threads, number, &row, &end);
    for (; row < end; row++) answer(c, row, chunks);
    barrier(c);
}
