/* Linear layers over many rows, with panels split among the threads. */
#include "kernels.h"

/* Compute ``rows`` rows for the columns of the panels ``first`` to ``last``. */
void linear_of(const Context *c, Rows from, const Linear *l, int rows, int first, int last, Then then) {
    int wide = filled(l->out), groups = groups_of(rows, c->kernels->rows);
    for (int panel = first; panel < last; panel++)
        for (int number = 0; number < groups; number++) {
            Group g = group_of(c->kernels, rows, number);
            c->kernels->tile(from, l, g, panel, then_at(then, (int64_t)g.row * wide + panel * PANEL), wide);
        }
}

/* Each thread computes some of the panels. */
void linear(Context *c, int number, int from, const Linear *l, int rows, Then then) {
    int first, last;
    share(filled(l->out) / PANEL, c->threads, number, &first, &last);
    linear_of(c, buffer(c, from), l, rows, first, last, then);
}

/* Convert the threads' joint output, ``given`` of a buffer, to the input of ``next``. */
void give_rows(Context *c, int number, int from, const Linear *next, int rows) {
    int first, last;
    barrier(c);
    if (next->is_float) return;
    share(rows, c->threads, number, &first, &last);
    for (int row = first; row < last; row++)
        c->kernels->give_row(buffer(c, from), next, row, c->given[from] + (int64_t)row * filled(next->in), 1.0f);
    barrier(c);
}
