/* Kernels for x86-64 CPUs with AVX-512 F, BW, DQ, VL and VNNI. */
#define NAME "avx512vnni"
#define TABLE kernels_avx512vnni

#include "vnni512.h"
#include "products512.h"
#include "causal512.h"
#include "table.h"
