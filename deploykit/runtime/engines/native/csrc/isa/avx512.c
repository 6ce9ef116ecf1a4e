/* Kernels for x86-64 CPUs with AVX-512 F, BW, DQ and VL, but without VNNI: Intel's Skylake and Cascade Lake's predecessors.
 *
 * VPMADDUBSW saturates sums of two products at 16 bits. Magnitudes of weights (up to 128) times signed activations (up to
 * 127) cannot reach that. So activations stay signed here, and are multiplied by the signs of the weights.
 *
 * Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", VPMADDUBSW. */
#define NAME "avx512"
#define TABLE kernels_avx512
#define ZERO 0
#define SHORTS /* of a language model's inputs: bytes would need the weights' signs, which takes longer */

#include "avx512.h"

INLINE Ints dot_shorts(Ints sum, Ints a, Ints b) { return i_add(sum, _mm512_madd_epi16(a, b)); }

/* Even and odd bytes are widened to 16 bits, because any bytes are allowed here. */
INLINE Ints dot_bytes(Ints sum, Ints bytes, Ints signed_bytes) {
    Ints even = _mm512_srai_epi16(_mm512_slli_epi16(signed_bytes, 8), 8), odd = _mm512_srai_epi16(signed_bytes, 8);
    sum = dot_shorts(sum, _mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), even);
    return dot_shorts(sum, _mm512_srli_epi16(bytes, 8), odd);
}

INLINE Ints dot_nibbles(Ints sum, Ints nibbles, Ints signed_bytes) {
    return dot_shorts(sum, _mm512_maddubs_epi16(nibbles, signed_bytes), _mm512_set1_epi16(1));
}

/* ``ahead``: weights to prefetch, ``apart`` bytes apart for each four inputs. */
INLINE void tile_int8(const int rows, const uint8_t *x, int64_t wide, const float *step, const Linear *l, int first, int add,
                      float *out, int64_t stride, const int8_t *ahead, int apart) {
    int quads = (l->in + 3) / 4;
    const int8_t *w = (const int8_t *)l->weight + (int64_t)first * quads * 4;
    Ints s[MOST_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++) s[r][j] = i_zero();
    for (int k = 0; k < quads; k++, w += 4 * PANEL) {
        _mm_prefetch(ahead + (int64_t)k * apart, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            Ints v = _mm512_load_si512(w + 64 * j), magnitude = _mm512_abs_epi8(v);
            __mmask64 negative = _mm512_movepi8_mask(v);
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, x + r * wide + 4 * k, 4);
                Ints all = i_set(four);
                s[r][j] = dot_nibbles(s[r][j], magnitude, _mm512_mask_sub_epi8(all, negative, i_zero(), all));
            }
        }
    }
    put_products(rows, s, l, first, step, add, out, stride);
}

#include "products512.h"
#include "causal512.h"
#include "table.h"
