/* Products by AVX-512 VNNI.
 *
 * Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", VPDPBUSD, VPDPWSSD. */
#pragma once
#define ZERO 128 /* VPDPBUSD multiplies unsigned by signed bytes */

#include "avx512.h"

INLINE Ints dot_bytes(Ints sum, Ints bytes, Ints signed_bytes) { return _mm512_dpbusd_epi32(sum, bytes, signed_bytes); }
INLINE Ints dot_nibbles(Ints sum, Ints nibbles, Ints signed_bytes) { return _mm512_dpbusd_epi32(sum, nibbles, signed_bytes); }
INLINE Ints dot_shorts(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }

/* Sums start from a negative offset, because activations are 128 too high. ``ahead``: weights to prefetch, ``apart`` bytes
 * apart for each four inputs. */
INLINE void tile_int8(const int rows, const uint8_t *x, int64_t wide, const float *step, const Linear *l, int first, int add,
                      float *out, int64_t stride, const int8_t *ahead, int apart) {
    int quads = (l->in + 3) / 4;
    const int8_t *w = (const int8_t *)l->weight + (int64_t)first * quads * 4;
    Ints s[MOST_ROWS][4];
    for (int j = 0; j < 4; j++) {
        s[0][j] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(l->offset + first + 16 * j));
        for (int r = 1; r < rows; r++) s[r][j] = s[0][j];
    }
    for (int k = 0; k < quads; k++, w += 4 * PANEL) {
        __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
        __m512i w2 = _mm512_load_si512(w + 128), w3 = _mm512_load_si512(w + 192);
        _mm_prefetch(ahead + (int64_t)k * apart, _MM_HINT_T0);
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * wide + 4 * k, 4);
            __m512i v = _mm512_set1_epi32(four);
            s[r][0] = dot_bytes(s[r][0], v, w0);
            s[r][1] = dot_bytes(s[r][1], v, w1);
            s[r][2] = dot_bytes(s[r][2], v, w2);
            s[r][3] = dot_bytes(s[r][3], v, w3);
        }
    }
    put_products(rows, s, l, first, step, add, out, stride);
}
