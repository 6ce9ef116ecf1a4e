/* Multiply rows by a matrix, for arm_instructions.py: arguments are engine or plain, the kind of layer, rows (up to MOST_ROWS),
 * repeats.
 *
 * "plain" is the loop that a programmer writes first. The compiler may use the instructions of the same CPU for it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { IN = 576, OUT = 64 };

const Kernels *deploykit_kernels(int number);

static void *take(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes)) exit(1);
    return memset(memory, 1, bytes);
}

__attribute__((noinline)) static void plain_product(const int8_t *x, const int8_t *w, float scale, float *out) {
    for (int o = 0; o < OUT; o++) {
        int32_t sum = 0;
        for (int i = 0; i < IN; i++) sum += x[i] * w[o * IN + i];
        out[o] = (float)sum * scale;
    }
}

int main(int count, char **given) {
    if (count != 5) return 2;
    int plain = !strcmp(given[1], "plain"), matrix = !strcmp(given[2], "matrix"), rows = atoi(given[3]), repeats = atoi(given[4]);
    const Kernels *k = deploykit_kernels(0);
    int8_t *w = take(IN * OUT), *x = take((size_t)rows * IN * sizeof(float));
    float *scale = take(OUT * sizeof(float)), *bias = take(OUT * sizeof(float)), *step = take((size_t)rows * sizeof(float));
    int32_t *offset = take(OUT * sizeof(int32_t));
    float *out = take((size_t)rows * OUT * sizeof(float));
    Linear l = {w, scale, offset, bias, IN, OUT, 0};
    Matrix m = {.weight = w, .scale = scale, .bias = bias, .in = IN, .out = OUT, .kind = INT8};
    Given from = {(uint8_t *)x, step, IN * sizeof(float), 1, NULL};
    for (int n = 0; n < repeats; n++) {
        for (int r = 0; plain && r < rows; r++) plain_product(x + r * IN, w, scale[0], out + r * OUT);
        for (int panel = 0; !plain && matrix && panel < OUT / COLUMNS; panel++)
            k->multiply(&from, &m, 0, rows, panel, 1, 0, out + panel * COLUMNS, OUT, (Ahead){NULL, 0});
        if (!plain && !matrix) k->tile((Rows){NULL, (uint8_t *)x, step}, &l, (Group){0, rows, 0, 1}, 0, (Then){.out = out}, OUT);
    }
    puts(k->name);
    return 0;
}
