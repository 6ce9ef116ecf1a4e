/* Kernels on float32 rows (quantization, norms, activations, embeddings), and the switch over a tile's rows. */
#pragma once

#define LEAST_GROUPS 3 /* that each prefetch part of the next panel: with fewer, memory is too slow */

/* 2^x, with a relative error of 4e-6. */
INLINE Floats power_of_two(Floats x) {
    Floats r = f_fraction(x);
    Floats p = f_fma(f_set(0.01367031f), r, f_set(0.05174500f));
    p = f_fma(p, r, f_set(0.24160436f));
    p = f_fma(p, r, f_set(0.69297292f));
    p = f_fma(p, r, f_set(1.00000349f));
    return f_scale(p, x);
}

INLINE Floats exponential(Floats x) { return power_of_two(f_mul(x, f_set(1.44269504f))); }

/* The normal distribution minus 1/2, for x >= 0: a polynomial of degree 4 through Chebyshev nodes around each multiple of
 * 1/2, with an error of at most 1e-6. */
static const float NORMAL[5][16] = {
    {0.0f, 0.191462457f, 0.341344744f, 0.43319279f, 0.477249861f, 0.493790329f, 0.498650104f, 0.499767363f, 0.49996832f,
     0.499996603f, 0.499999702f, 0.49999997f, 0.5f, 0.5f, 0.5f, 0.5f},
    {0.398930222f, 0.352059752f, 0.241975576f, 0.129524708f, 0.0539937243f, 0.0175275113f, 0.00443050405f, 0.000871974393f,
     0.000133605892f, 1.59354095e-05f, 1.47928154e-06f, 1.06859041e-07f, 6.00556893e-09f, 2.62526889e-10f, 8.9235945e-12f, 0.0f},
    {0.0f, -0.0880126134f, -0.120982915f, -0.097138986f, -0.053992603f, -0.0219110046f, -0.0066476413f, -0.00152697531f,
     -0.000267559342f, -3.59359838e-05f, -3.71179499e-06f, -2.95521829e-07f, -1.81668334e-08f, -8.63360883e-10f,
     -3.1731593e-11f, 0.0f},
    {-0.0657169595f, -0.0436516181f, -0.000311340322f, 0.0265270509f, 0.0268191658f, 0.015388051f, 0.00599527685f,
     0.00168158649f, 0.000348901987f, 5.43625756e-05f, 6.42022997e-06f, 5.78287484e-07f, 3.98993194e-08f, 2.11539497e-09f,
     8.63894373e-11f, 0.0f},
    {0.0f, 0.0199321527f, 0.0200072788f, 0.00612167129f, -0.00439435756f, -0.00589381065f, -0.00333233038f, -0.00119126972f,
     -0.000296431972f, -5.34493411e-05f, -7.13324334e-06f, -7.13719089e-07f, -5.39915064e-08f, -3.10649417e-09f,
     -1.36867628e-10f, 0.0f},
};

INLINE Floats normal(Floats x) {
    const Floats shift = f_set(6291456.0f); /* its last bit has the value 1/2 */
    Floats at = f_add(f_min(x, f_set(7.5f)), shift);
    Floats r = f_sub(x, f_sub(at, shift));
    Ints i = f_bits(at);
    Floats p = f_lookup(NORMAL[4], i);
    for (int k = 3; k >= 0; k--) p = f_fma(p, r, f_lookup(NORMAL[k], i));
    return p;
}

INLINE Floats sigmoid(Floats x) {
    Floats least = f_max(x, f_set(-88.0f)); /* below this the exponential is infinite */
    return f_div(f_set(1.0f), f_add(f_set(1.0f), power_of_two(f_mul(least, f_set(-1.44269504f)))));
}

INLINE Floats activated(int kind, Floats x) {
    switch (kind) {
    case RELU: return f_max(x, f_zero());
    case SILU: return f_mul(x, sigmoid(x));
    case GELU: {
        Floats a = f_abs(x);
        return f_fma(a, normal(a), f_mul(x, f_set(0.5f)));
    }
    case GELU_TANH: { /* 0.5 (1 + tanh y) is the sigmoid of 2 y */
        Floats cube = f_mul(f_mul(x, x), x);
        Floats y = f_mul(f_fma(f_set(0.044715f), cube, x), f_set(1.59576912f));
        return f_mul(x, sigmoid(y));
    }
    case TANH: return f_fms(f_set(2.0f), sigmoid(f_add(x, x)), f_set(1.0f));
    default: return x;
    }
}

static void activate(int kind, const float *factor, float *x, int rows, int64_t stride) {
    for (int64_t at = 0; rows--; at += stride)
        for (int j = 0; j < PANEL; j += 16) {
            Floats v = activated(kind, f_load(x + at + j));
            if (factor) v = f_mul(v, f_load(factor + at + j));
            f_store(x + at + j, v);
        }
}

/* The largest magnitude of ``n`` values. */
INLINE float largest_of(const float *x, int n) {
    Floats most = f_zero();
    for (int i = 0; i < n; i += 16) most = f_max(most, f_abs(f_load_some(x + i, n - i)));
    return f_highest(most);
}

static void give_row(Rows to, const Linear *next, int row, const float *x, float scale) {
    int n = next->in, wide = filled(n);
    if (next->is_float) {
        float *y = to.given + (int64_t)row * wide;
        for (int i = 0; i < wide; i += 16) f_store(y + i, f_mul(f_load_some(x + i, n - i), f_set(scale)));
        return;
    }
    uint8_t *y = to.quantized + (int64_t)row * wide;
    float highest = largest_of(x, n);
    Floats inverse = f_set(highest > 0 ? 127.0f / highest : 0.0f);
    for (int i = 0; i < wide; i += 16)
        i_put_bytes(y + i, i_add(i_round(f_mul(f_load_some(x + i, n - i), inverse)), i_set(ZERO)));
    to.step[row] = highest / 127.0f * scale;
}

static void normalize(const Norm *norm, const float *x, float *y, int n) {
    Floats sum = f_zero(), mean = sum;
    if (norm->beta) {
        for (int i = 0; i < n; i += 16) sum = f_add(sum, f_load_some(x + i, n - i));
        mean = f_set(f_sum(sum) / (float)n);
        sum = f_zero();
    }
    for (int i = 0; i < n; i += 16) {
        Floats d = f_first(f_sub(f_load(x + i), mean), n - i);
        sum = f_fma(d, d, sum);
    }
    Floats scale = f_set(1.0f / sqrtf(f_sum(sum) / (float)n + norm->epsilon));
    for (int i = 0; i < n; i += 16) {
        Floats d = f_mul(f_first(f_sub(f_load(x + i), mean), n - i), scale);
        Floats beta = norm->beta ? f_load_some(norm->beta + i, n - i) : f_zero();
        f_store(y + i, f_fma(d, f_load_some(norm->gamma + i, n - i), beta));
    }
}

static void embed_column(const Stack *s, int64_t token, const float *positions, float *x) {
    int quads = (s->hidden + 3) / 4;
    const int8_t *column = s->embedding + (token / PANEL) * (int64_t)quads * 4 * PANEL + token % PANEL * 4;
    for (int i = 0; i < filled(s->hidden); i += 16) {
        int32_t four[4] = {0};
        for (int j = 0; j < 4 && i / 4 + j < quads; j++) memcpy(&four[j], column + (int64_t)(i / 4 + j) * (4 * PANEL), 4);
        Floats v = f_mul(f_from(i_load_bytes((int8_t *)four, 16)), f_set(s->embedding_scale[token]));
        f_store(x + i, positions ? f_add(v, f_load_some(positions + i, s->hidden - i)) : v);
    }
}

static void embed_row(const Stack *s, int64_t token, const float *positions, float *x) {
    const int8_t *values = s->embedding + token * s->hidden;
    Floats scale = f_set(s->embedding_scale[token]);
    for (int i = 0; i < s->hidden; i += 16) {
        int left = s->hidden - i;
        f_store(x + i, f_fma(f_from(i_load_bytes(values + i, left)), scale, f_load_some(positions + i, left)));
    }
}

static void tile(Rows from, const Linear *l, Group g, int panel, Then then, int64_t stride) {
    int64_t wide = filled(l->in), bytes = (l->in + 3) / 4 * (4 * PANEL);
    int first = panel * PANEL, apart = g.of < LEAST_GROUPS ? 0 : (4 * PANEL + g.of - 1) / g.of;
    const int8_t *ahead = (const int8_t *)l->weight + (apart ? (panel + 1) * bytes + bytes * g.number / g.of : panel * bytes);
#define ROWS(n) \
    if (l->is_float) tile_float(n, from.given + g.row * wide, wide, l, first, then.add, then.out, stride); \
    else tile_int8(n, from.quantized + g.row * wide, wide, from.step + g.row, l, first, then.add, then.out, stride, ahead, apart); \
    break
    switch (g.rows) {
    case 1: ROWS(1);
    case 2: ROWS(2);
    case 3: ROWS(3);
    case 4: ROWS(4);
    case 5: ROWS(5);
    default: ROWS(6);
    }
#undef ROWS
    if (then.activation || then.factor) activate(then.activation, then.factor, then.out, g.rows, stride);
}
