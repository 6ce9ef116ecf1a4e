/* Kernels for x86-64 CPUs with AVX2 and FMA.
 *
 * VPMADDUBSW multiplies unsigned by signed bytes and saturates sums of two products at 16 bits. Magnitudes of weights (up to
 * 128) times signed activations (up to 127) cannot reach that. So activations stay signed here, and are multiplied by the
 * signs of the weights. Products with 16-bit numbers use VPMADDWD, which sums in 32 bits.
 *
 * Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", VPMADDUBSW, VPSIGNB. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "../kernels.h"

#define NAME "avx2"
#define TABLE kernels_avx2
#define ZERO 0

typedef struct { __m256 a, b; } Floats;
typedef struct { __m256i a, b; } Ints;

static const int32_t ONES_THEN_ZEROS[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
static const int32_t BITS[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};

/* Masks of the first ``left`` of 16 lanes. */
INLINE Ints first_of(int left) {
    const int32_t *from = ONES_THEN_ZEROS + 16 - (left >= 16 ? 16 : left > 0 ? left : 0);
    return (Ints){_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)(from + 8))};
}

INLINE Floats f_zero(void) { return (Floats){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats f_set(float x) { return (Floats){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats f_load(const float *x) { return (Floats){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
INLINE Floats f_load_some(const float *x, int left) {
    if (left >= 16) return f_load(x);
    Ints mask = first_of(left);
    return (Floats){_mm256_maskload_ps(x, mask.a), _mm256_maskload_ps(x + 8, mask.b)};
}
INLINE void f_store(float *to, Floats x) {
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
}
INLINE void f_store_some(float *to, Floats x, int left) {
    if (left >= 16) {
        f_store(to, x);
        return;
    }
    Ints mask = first_of(left);
    _mm256_maskstore_ps(to, mask.a, x.a);
    _mm256_maskstore_ps(to + 8, mask.b, x.b);
}
INLINE Floats f_first(Floats x, int left) {
    if (left >= 16) return x;
    Ints mask = first_of(left);
    return (Floats){_mm256_and_ps(x.a, _mm256_castsi256_ps(mask.a)), _mm256_and_ps(x.b, _mm256_castsi256_ps(mask.b))};
}
INLINE Floats f_blend(Ints mask, Floats a, Floats b) {
    return (Floats){_mm256_blendv_ps(a.a, b.a, _mm256_castsi256_ps(mask.a)),
                    _mm256_blendv_ps(a.b, b.b, _mm256_castsi256_ps(mask.b))};
}
INLINE Floats f_load_or(const float *x, int left, float other) {
    return left >= 16 ? f_load(x) : f_blend(first_of(left), f_set(other), f_load_some(x, left));
}
INLINE Floats f_select(uint32_t mask, Floats a, Floats b) {
    if (mask == 0xffff) return b;
    __m256i all = _mm256_set1_epi32((int)mask), low = _mm256_loadu_si256((const __m256i *)BITS);
    __m256i high = _mm256_loadu_si256((const __m256i *)(BITS + 8));
    return f_blend((Ints){_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low),
                          _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high)}, a, b);
}
INLINE Floats f_where_positive(Floats x, Floats y) {
    __m256 zero = _mm256_setzero_ps();
    return (Floats){_mm256_and_ps(_mm256_cmp_ps(x.a, zero, _CMP_GT_OQ), y.a),
                    _mm256_and_ps(_mm256_cmp_ps(x.b, zero, _CMP_GT_OQ), y.b)};
}
INLINE Floats f_add(Floats a, Floats b) { return (Floats){_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
INLINE Floats f_sub(Floats a, Floats b) { return (Floats){_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
INLINE Floats f_mul(Floats a, Floats b) { return (Floats){_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
INLINE Floats f_div(Floats a, Floats b) { return (Floats){_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
INLINE Floats f_fma(Floats a, Floats b, Floats c) {
    return (Floats){_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
INLINE Floats f_fms(Floats a, Floats b, Floats c) {
    return (Floats){_mm256_fmsub_ps(a.a, b.a, c.a), _mm256_fmsub_ps(a.b, b.b, c.b)};
}
INLINE Floats f_max(Floats a, Floats b) { return (Floats){_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
INLINE Floats f_min(Floats a, Floats b) { return (Floats){_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
INLINE Floats f_abs(Floats x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (Floats){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE __m256 eight_fraction(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-300.0f)); /* avoids subtracting from minus infinity */
    return _mm256_sub_ps(x, _mm256_floor_ps(x));
}
INLINE Floats f_fraction(Floats x) { return (Floats){eight_fraction(x.a), eight_fraction(x.b)}; }

/* x 2^floor(y), in two factors: one float cannot hold all powers, and only the last product may round. */
INLINE __m256 eight_scale(__m256 x, __m256 y) {
    y = _mm256_max_ps(_mm256_min_ps(y, _mm256_set1_ps(252.0f)), _mm256_set1_ps(-252.0f));
    __m256i n = _mm256_cvtps_epi32(_mm256_floor_ps(y)), half = _mm256_srai_epi32(n, 1), one = _mm256_set1_epi32(127);
    __m256i rest = _mm256_sub_epi32(n, half);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23)));
}
INLINE Floats f_scale(Floats x, Floats y) { return (Floats){eight_scale(x.a, y.a), eight_scale(x.b, y.b)}; }

INLINE uint32_t f_greater(Floats x, float y) {
    __m256 all = _mm256_set1_ps(y);
    return (uint32_t)(_mm256_movemask_ps(_mm256_cmp_ps(x.a, all, _CMP_GT_OQ)) |
                      _mm256_movemask_ps(_mm256_cmp_ps(x.b, all, _CMP_GT_OQ)) << 8);
}
INLINE float f_highest(Floats x) {
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE float f_sum(Floats x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

INLINE void transpose_eight(__m256 x[8]) {
    __m256 y[8], z[8];
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            z[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
            z[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(z[i], z[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(z[i], z[i + 4], 0x31);
    }
}
INLINE void f_transpose(Floats x[16]) {
    __m256 q[4][8]; /* quarters: rows 0-7 left, right; rows 8-15 left, right */
    for (int i = 0; i < 8; i++) {
        q[0][i] = x[i].a;
        q[1][i] = x[i].b;
        q[2][i] = x[i + 8].a;
        q[3][i] = x[i + 8].b;
    }
    for (int i = 0; i < 4; i++) transpose_eight(q[i]);
    for (int i = 0; i < 8; i++) {
        x[i] = (Floats){q[0][i], q[2][i]};
        x[i + 8] = (Floats){q[1][i], q[3][i]};
    }
}

INLINE Ints f_bits(Floats x) { return (Ints){_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
INLINE Floats f_from(Ints x) { return (Floats){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE __m256 eight_lookup(const float *table, __m256i i) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
INLINE Floats f_lookup(const float *table, Ints i) { return (Floats){eight_lookup(table, i.a), eight_lookup(table, i.b)}; }

INLINE Ints i_zero(void) { return (Ints){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE Ints i_set(int32_t x) { return (Ints){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Ints i_round(Floats x) { return (Ints){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE Ints i_add(Ints a, Ints b) { return (Ints){_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
INLINE int32_t i_sum(Ints x) {
    __m256i eight = _mm256_add_epi32(x.a, x.b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
INLINE __m256i eight_pair(__m256i a, __m256i b) {
    return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
}
INLINE Ints i_pair(Ints a, Ints b) { return (Ints){eight_pair(a.a, b.a), eight_pair(a.b, b.b)}; }
INLINE uint32_t i_equal(const int32_t *x, int32_t y) {
    __m256i all = _mm256_set1_epi32(y);
    __m256i a = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i *)x), all);
    __m256i b = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i *)(x + 8)), all);
    return (uint32_t)(_mm256_movemask_ps(_mm256_castsi256_ps(a)) | _mm256_movemask_ps(_mm256_castsi256_ps(b)) << 8);
}
INLINE Ints i_load_bytes(const int8_t *x, int left) {
    int8_t some[16] = {0};
    if (left < 16) memcpy(some, x, left > 0 ? (size_t)left : 0);
    __m128i bytes = _mm_loadu_si128((const __m128i *)(left < 16 ? some : x));
    return (Ints){_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
INLINE void i_store(void *to, Ints x) {
    _mm256_storeu_si256(to, x.a);
    _mm256_storeu_si256((__m256i *)to + 1, x.b);
}
/* The low 16 bits of each. */
INLINE __m256i shorts_of(Ints x) {
    __m256i mask = _mm256_set1_epi32(0xffff);
    __m256i packed = _mm256_packus_epi32(_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}
INLINE void i_put_shorts(void *to, Ints x) { _mm256_storeu_si256(to, shorts_of(x)); }
INLINE void i_put_bytes(void *to, Ints x) {
    __m256i shorts = _mm256_and_si256(shorts_of(x), _mm256_set1_epi16(0xff));
    _mm_storeu_si128(to, _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
}
INLINE void i_put_every_fourth_byte(int8_t *to, Ints x, int place) {
    __m256i mask = _mm256_set1_epi32((int32_t)(0xffu << place * 8)), *at = (__m256i *)to;
    __m128i by = _mm_cvtsi32_si128(place * 8);
    _mm256_storeu_si256(at, _mm256_blendv_epi8(_mm256_loadu_si256(at), _mm256_sll_epi32(x.a, by), mask));
    _mm256_storeu_si256(at + 1, _mm256_blendv_epi8(_mm256_loadu_si256(at + 1), _mm256_sll_epi32(x.b, by), mask));
}

#include "slots.h"

/* ---- linear layers ---- */

/* Broadcast four bytes. Each ``use`` loads them again: all rows' bytes do not fit the registers beside the sums, and the
 * compiler would spill them. */
#define FOUR_BYTES(x, use) \
    ({ \
        __m256i v_; \
        __asm__("vpbroadcastd %1, %0" : "=x"(v_) : "m"(*(const int32_t *)(x)), "i"(use)); \
        v_; \
    })

/* Compute a tile's columns, 8 for each of ``vectors`` vectors from ``part`` on. ``ahead``: weights to prefetch, ``apart``
 * bytes apart for each four inputs. */
INLINE void columns_int8(const int rows, const int vectors, int part, const int8_t *x, int64_t wide, const float *step,
                         const Linear *l, int first, int add, float *out, int64_t stride, const int8_t *ahead, int apart) {
    int quads = (l->in + 3) / 4, column = 8 * vectors * part;
    const int8_t *w = (const int8_t *)l->weight + (int64_t)first * quads * 4 + 4 * column;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i s[MOST_ROWS][8];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++) s[r][j] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int k = 0; k < quads; k++, w += 4 * PANEL) {
        _mm_prefetch((const char *)(ahead + (int64_t)k * apart), _MM_HINT_T0);
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)w + j), magnitude = _mm256_abs_epi8(v);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                __m256i four = FOUR_BYTES(x + r * wide + 4 * k, j);
                __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(four, v));
                s[r][j] = _mm256_add_epi32(s[r][j], _mm256_madd_epi16(products, ones));
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
    for (int part = 0; part < parts; part++, ahead += (int64_t)each * ((l->in + 3) / 4))
        columns_int8(rows, vectors, part, (const int8_t *)x, wide, step, l, first, add, out, stride, ahead, each);
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
                s[j] = _mm256_add_epi32(s[j], _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(k + j)), four));
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
                    h[i] = _mm256_add_epi32(h[i], _mm256_madd_epi16(x, high));
                    l[i] = _mm256_add_epi32(l[i], _mm256_madd_epi16(x, low));
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
            s[r][0] = _mm256_add_epi32(s[r][0], _mm256_madd_epi16(p, v0));
            s[r][1] = _mm256_add_epi32(s[r][1], _mm256_madd_epi16(p, v1));
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

#include "causal_avx2.h"
#include "table.h"
