/* Kernels for 64-bit Arm CPUs with products of signed bytes (FEAT_DotProd), such as Neoverse N1 and Cortex-A76. */
#define NAME "dotprod"
#define TABLE kernels_dotprod
#define UNSIGNED 0

#include "dotprod.h"

INLINE void tile_int8(const int rows, const uint8_t *x, int64_t wide, const float *step, const Linear *l, int first, int add,
                      float *out, int64_t stride, const int8_t *ahead, int apart) {
    tile_dot(rows, x, wide, step, l, first, add, out, stride, ahead, apart);
}

#include "table.h"
