/* Kernels for x86-64 CPUs with AVX2, FMA and AVX-VNNI: Intel since Alder Lake, AMD since Zen 5.
 *
 * Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", VPDPBUSD, VPDPWSSD. */
#define NAME "avxvnni"
#define TABLE kernels_avxvnni
#define ZERO 128 /* VPDPBUSD multiplies unsigned by signed bytes */

#include "avx2.h"

INLINE __m256i dot_shorts(__m256i sum, __m256i a, __m256i b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }

typedef __m256i Weights;

INLINE Weights weights_of(__m256i bytes) { return bytes; }
INLINE __m256i dot_weights(__m256i sum, __m256i four, Weights w) { return _mm256_dpbusd_avx_epi32(sum, four, w); }

INLINE __m256i dot_nibbles(__m256i sum, __m256i nibbles, __m256i bytes) { return _mm256_dpbusd_avx_epi32(sum, nibbles, bytes); }
INLINE __m256i nibble_sums(__m256i sum) { return sum; }

#include "products256.h"
#include "causal256.h"
#include "table.h"
