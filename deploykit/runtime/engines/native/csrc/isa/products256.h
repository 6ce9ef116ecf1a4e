/* Products that all instruction sets with AVX2 share. They are built from:
 * - Weights, weights_of and dot_weights: products of activations plus ZERO by weights;
 * - dot_shorts: adds products of 16-bit numbers, in pairs;
 * - dot_nibbles, nibble_sums: products of unsigned bytes up to 15 by signed ones, and their sums in 32 bits. */
#include "slots.h"

/* ---- linear layers ---- */

/* Broadcast four bytes. Each ``use`` loads them again: all rows' bytes and the sums do not fit the registers, and the
 * compiler would spill them. Sanitizers leave no register for assembler. */
#ifdef __SANITIZE_ADDRESS__
#define FOUR_BYTES(x, use) \
    ({ \
        int32_t four_; \
        memcpy(&four_, x, 4); \
        _mm256_set1_epi32(four_); \
    })
#else
#define FOUR_BYTES(x, use) \
    ({ \
        __m256i v_; \
        __asm__("vpbroadcastd %1, %0" : "=x"(v_) : "m"(*(const int32_t *)(x)), "i"(use)); \
        v_; \
    })
#endif

/* Compute a tile's columns, 8 for each of ``vectors`` vectors from ``part`` on. ``ahead``: weights to prefetch, ``apart``
 * bytes apart for each four inputs. */
INLINE void columns_int8(const int rows, const int vectors, int part, const int8_t *x, int64_t wide, const float *step,
                         const Linear *l, int first, int add, float *out, int64_t stride, uintptr_t ahead, int apart) {
    int quads = (l->in + 3) / 4, column = 8 * vectors * part;
    const int8_t *w = (const int8_t *)l->weight + (int64_t)first * quads * 4 + 4 * column;
    __m256i s[MOST_ROWS][8];
    for (int j = 0; j < vectors; j++) {
        s[0][j] = _mm256_setzero_si256();
        if (ZERO) s[0][j] = _mm256_sub_epi32(s[0][j], _mm256_loadu_si256((const __m256i *)(l->offset + first + column + 8 * j)));
        for (int r = 1; r < rows; r++) s[r][j] = s[0][j];
    }
#pragma GCC unroll 2
    for (int k = 0; k < quads; k++, w += 4 * PANEL) {
        _mm_prefetch((const char *)(ahead + (uintptr_t)k * apart), _MM_HINT_T0);
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) {
            Weights v = weights_of(_mm256_loadu_si256((const __m256i *)w + j));
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                s[r][j] = dot_weights(s[r][j], FOUR_BYTES(x + r * wide + 4 * k, j), v);
            }
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < vectors; j++) {
        int at = column + 8 * j;
        __m256 scale = _mm256_loadu_ps(l->scale + first + at), bias = _mm256_loadu_ps(l->bias + first + at);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m256 worth = _mm256_mul_ps(scale, _mm256_set1_ps(step[r]));
            __m256 v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s[r][j]), worth, bias);
            float *to = out + r * stride + at;
            _mm256_storeu_ps(to, add ? _mm256_add_ps(v, _mm256_loadu_ps(to)) : v);
        }
    }
}

INLINE void tile_int8(const int rows, const uint8_t *x, int64_t wide, const float *step, const Linear *l, int first, int add,
                      float *out, int64_t stride, const int8_t *ahead, int apart) {
    const int vectors = rows == 1 ? 8 : rows <= 3 ? 4 : 2; /* sums take up to 12 of the 16 registers */
    const int parts = PANEL / 8 / vectors, each = (apart + parts - 1) / parts;
    uintptr_t at = (uintptr_t)ahead; /* no pointer: it may be NULL, and go beyond the weights */
    for (int part = 0; part < parts; part++, at += (uintptr_t)each * ((l->in + 3) / 4))
        columns_int8(rows, vectors, part, (const int8_t *)x, wide, step, l, first, add, out, stride, at, each);
}

INLINE void tile_float(const int rows, const float *x, int64_t wide, const Linear *l, int first, int add, float *out,
                       int64_t stride) {
    const int vectors = rows == 1 ? 8 : rows <= 3 ? 4 : 2;
    for (int column = 0; column < PANEL; column += 8 * vectors) {
        const float *w = (const float *)l->weight + (int64_t)first * l->in + column;
        __m256 s[MOST_ROWS][8];
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < vectors; j++) s[r][j] = _mm256_setzero_ps();
        for (int k = 0; k < l->in; k++, w += PANEL)
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                __m256 v = _mm256_set1_ps(x[r * wide + k]);
#pragma GCC unroll 8
                for (int j = 0; j < vectors; j++) s[r][j] = _mm256_fmadd_ps(v, _mm256_loadu_ps(w + 8 * j), s[r][j]);
            }
        for (int j = 0; j < vectors; j++) {
            __m256 bias = _mm256_loadu_ps(l->bias + first + column + 8 * j);
            for (int r = 0; r < rows; r++) {
                __m256 v = _mm256_add_ps(s[r][j], bias);
                float *to = out + r * stride + column + 8 * j;
                _mm256_storeu_ps(to, add ? _mm256_add_ps(v, _mm256_loadu_ps(to)) : v);
            }
        }
    }
}

/* ---- a decoder's attention: a register holds four bytes of 4 vectors, widened to 16 bits ---- */

/* Broadcast four 16-bit numbers. */
INLINE __m256i four_shorts(const void *x) {
    int64_t four;
    memcpy(&four, x, 8);
    return _mm256_set1_epi64x(four);
}

/* Sums of neighbours of ``a``, then of ``b``. */
INLINE __m256i sum_pairs(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8); }

typedef struct { int16_t v[256]; } Query;

INLINE void put_query(Query *q, int i, Ints v) { i_put_shorts(q->v + i, v); }

/* Set ``product[g]`` to a query's products with 16 keys, too high by 128 x the query's sum. In heads of up to 256 values,
 * sums fit 32 bits. Prefetches the values of the same positions. */
INLINE void key_products(const int heads, const Query *q, const int8_t *keys, int64_t keys_apart, int padded,
                         const int8_t *values, int64_t values_apart, Floats *product) {
    for (int g = 0; g < heads; g++) {
        __m256i s[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int i = 0; i < padded / 4; i++) {
            const __m128i *k = (const __m128i *)(keys + g * keys_apart + 64 * i);
            __m256i four = four_shorts(q[g].v + 4 * i);
            _mm_prefetch((const char *)(values + g * values_apart + 64 * i), _MM_HINT_T0);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                s[j] = dot_shorts(s[j], _mm256_cvtepu8_epi16(_mm_loadu_si128(k + j)), four);
        }
        product[g] = f_from((Ints){sum_pairs(s[0], s[1]), sum_pairs(s[2], s[3])});
    }
}

#define COUNT_BYTES 4

/* Write the high bytes of 16 counts, then the low bytes, as 16 bits each. */
INLINE void put_counts(uint8_t *p, Ints counts) {
    __m256i shorts = shorts_of(counts);
    _mm256_storeu_si256((__m256i *)p, _mm256_srli_epi16(shorts, 8));
    _mm256_storeu_si256((__m256i *)p + 1, _mm256_and_si256(shorts, _mm256_set1_epi16(0xff)));
}

/* Multiply values by counts for ``part``, 16 values of a head. High and low bytes of counts are summed separately, because
 * in float32 sums over many positions would round differently. */
INLINE void gather_part(const uint8_t *p, const int8_t *values, int padded, const int32_t *table, int64_t stride, int n,
                        float worth, float *out, int size) {
    __m256i h[4], l[4];
    for (int i = 0; i < 4; i++) h[i] = l[i] = _mm256_setzero_si256();
    for (int t = 0; t < n; t += 16)
        EACH_SLOT(t) {
            int16_t counts[32];
            memcpy(counts, p + COUNT_BYTES * t, sizeof(counts));
            for (int i = 0; its != 0xffff && i < 16; i++)
                if (!(its >> i & 1)) counts[i] = counts[i + 16] = 0;
            const int8_t *v = values + from * padded;
            for (int j = 0; j < 4 && t + 4 * j < n; j++, v += 4 * padded) {
                __m256i high = four_shorts(counts + 4 * j), low = four_shorts(counts + 16 + 4 * j);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)v + i));
                    h[i] = dot_shorts(h[i], x, high);
                    l[i] = dot_shorts(l[i], x, low);
                }
            }
        }
    Floats high = f_from((Ints){sum_pairs(h[0], h[1]), sum_pairs(h[2], h[3])});
    Floats low = f_from((Ints){sum_pairs(l[0], l[1]), sum_pairs(l[2], l[3])});
    f_store_some(out, f_mul(f_fma(high, f_set(256.0f), low), f_set(worth)), size);
}

INLINE void gather(const int parts, const uint8_t *p, const int8_t *values, int padded, const int32_t *table, int64_t stride,
                   int n, float worth, float *out, int size) {
    for (int i = 0; i < parts; i++)
        gather_part(p, values + 64 * i, padded, table, stride, n, worth, out + 16 * i, size - 16 * i);
}

/* ---- a classifier's attention ---- */

/* Compute ``sums`` of ``rows`` rows for 16 values of a head. */
INLINE void sixteen_sums(const int rows, const int16_t *shares, int64_t keys, const int32_t *v, int padded, int64_t pairs,
                         Ints *sums) {
    __m256i s[MOST_ROWS][2];
    for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = _mm256_setzero_si256();
    for (int j = 0; j < pairs; j++, v += padded) {
        __m256i v0 = _mm256_loadu_si256((const __m256i *)v), v1 = _mm256_loadu_si256((const __m256i *)v + 1);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32_t two;
            memcpy(&two, shares + r * keys + 2 * j, 4);
            __m256i p = _mm256_set1_epi32(two);
            s[r][0] = dot_shorts(s[r][0], p, v0);
            s[r][1] = dot_shorts(s[r][1], p, v1);
        }
    }
    for (int r = 0; r < rows; r++) sums[2 * r] = (Ints){s[r][0], s[r][1]};
}

/* Set ``sum`` to shares times values, for 32 values of a head. */
INLINE void value_sums(int rows, const int16_t *shares, int64_t keys, const int32_t *v, int padded, int64_t pairs,
                       Ints sum[MOST_ROWS][2]) {
    for (int j = 0; j < 2; j++)
        if (rows == 1) sixteen_sums(1, shares, keys, v + 16 * j, padded, pairs, &sum[0][j]);
        else sixteen_sums(MOST_ROWS, shares, keys, v + 16 * j, padded, pairs, &sum[0][j]); /* unused rows are not read */
}
