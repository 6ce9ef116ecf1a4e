/* Kernels for x86-64 CPUs with AVX2 and FMA.
 *
 * VPMADDUBSW multiplies unsigned by signed bytes and saturates sums of two products at 16 bits. Magnitudes of weights (up to
 * 128) times signed activations (up to 127) cannot reach that. So activations stay signed here, and are multiplied by the
 * signs of the weights. Products with 16-bit numbers use VPMADDWD, which sums in 32 bits.
 *
 * Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", VPMADDUBSW, VPSIGNB. */
#define NAME "avx2"
#define TABLE kernels_avx2
#define ZERO 0
#define SHORTS /* of a language model's inputs: bytes would need the weights' signs, which takes longer */

#include "avx2.h"

INLINE __m256i dot_shorts(__m256i sum, __m256i a, __m256i b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

typedef struct { __m256i signs, magnitudes; } Weights;

INLINE Weights weights_of(__m256i bytes) { return (Weights){bytes, _mm256_abs_epi8(bytes)}; }
INLINE __m256i dot_weights(__m256i sum, __m256i four, Weights w) {
    __m256i products = _mm256_maddubs_epi16(w.magnitudes, _mm256_sign_epi8(four, w.signs));
    return dot_shorts(sum, products, _mm256_set1_epi16(1));
}

/* The sum of 8 products of up to 15 by up to 127, two of which are added, fits 16 bits. */
INLINE __m256i dot_nibbles(__m256i sum, __m256i nibbles, __m256i bytes) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(nibbles, bytes));
}
INLINE __m256i nibble_sums(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

#include "products256.h"
#include "causal256.h"
#include "table.h"
