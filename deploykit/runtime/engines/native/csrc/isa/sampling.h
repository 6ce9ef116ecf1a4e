/* Kernels on the logits of a whole vocabulary, to sample a token from them. */
#pragma once

static float highest_of(const float *x, int n) {
    Floats most = f_set(-INFINITY);
    for (int i = 0; i < n; i += 16) most = f_max(most, f_load_or(x + i, n - i, -INFINITY));
    return f_highest(most);
}

static void shares_of(const float *x, int n, float highest, float slope, float *shares, double *sums) {
    for (int first = 0; first < n; first += SHARES) {
        Floats sum = f_zero();
        for (int i = first; i < first + SHARES && i < n; i += 16) {
            Floats share = f_first(power_of_two(f_mul(f_sub(f_load_some(x + i, n - i), f_set(highest)), f_set(slope))), n - i);
            sum = f_add(sum, share);
            f_store_some(shares + i, share, n - i);
        }
        *sums++ = (double)f_sum(sum);
    }
}

static int find_over(const float *x, int n, float limit, int32_t *places) {
    int found = 0;
    for (int i = 0; i < n; i += 16)
        for (uint32_t over = f_greater(f_load_or(x + i, n - i, -INFINITY), limit); over; over &= over - 1)
            places[found++] = i + __builtin_ctz(over);
    return found;
}
