/* Products of a language model's matrices, and float16 caches, for scalar.c. */

INLINE uint16_t half_of(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits < 0x38800000) return (uint16_t)(sign | (uint32_t)rintf(fabsf(x) * 16777216.0f)); /* below 2^-14 */
    return (uint16_t)(sign | (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}
INLINE float float_of_half(uint16_t x) {
    uint32_t bits = (x & 0x7fffu) << 13;
    float y = (float)(x & 0x3ff) / 16777216.0f;
    if (x & 0x7c00) {
        bits += 0x38000000;
        memcpy(&y, &bits, 4);
    }
    return x & 0x8000 ? -y : y;
}
INLINE Floats f_load_halves(const uint16_t *x) { FLOATS(float_of_half(x[i])); }
INLINE void f_store_halves(uint16_t *to, Floats x) { EACH to[i] = half_of(x.v[i]); }

INLINE void tile_bytes(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                       int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    const int8_t *w = (const int8_t *)m->weight + panel * panel_bytes(m);
    const float *scale = (const float *)m->scale + panel * COLUMNS, *bias = m->bias + panel * COLUMNS;
    (void)ahead;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < COLUMNS; j++) {
            const int8_t *row = (const int8_t *)(x + r * stride);
            int32_t sum = 0;
            for (int k = 0; k < wide(m->in); k++) sum += row[k] * w[(k / 4 * COLUMNS + j) * 4 + k % 4];
            float v = fmaf((float)sum, scale[j] * steps[r * apart], bias[j]), *to = out + r * out_stride + j;
            *to = add ? v + *to : v;
        }
}

INLINE float float_of_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE void tile_nibbles(const int rows, const uint8_t *x, int64_t stride, const float *steps, int64_t apart, const Matrix *m,
                         int panel, int add, float *out, int64_t out_stride, Ahead ahead) {
    int blocks = blocks_of(m->in);
    int64_t first = (int64_t)panel * blocks * COLUMNS;
    const uint8_t *w = (const uint8_t *)m->weight + panel * panel_bytes(m);
    (void)ahead;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < COLUMNS; j++) {
            const int8_t *row = (const int8_t *)(x + r * stride);
            float sum = 0.0f, *to = out + r * out_stride + j;
            for (int b = 0; b < blocks; b++) {
                int64_t at = first + b * COLUMNS + j;
                int32_t product = 0;
                for (int k = 0; k < BLOCK; k++) {
                    uint8_t two = w[((b * 4 + k % 16 / 4) * COLUMNS + j) * 4 + k % 4];
                    product += row[b * BLOCK + k] * (k < 16 ? two & 15 : two >> 4);
                }
                sum = fmaf((float)product * float_of_bfloat16(((const uint16_t *)m->scale)[at]), steps[r * apart + b], sum);
                sum = fmaf(float_of_bfloat16(m->low[at]), steps[r * apart + blocks + b], sum);
            }
            sum += m->bias[panel * COLUMNS + j];
            *to = add ? sum + *to : sum;
        }
}

INLINE void tile_floats(const int rows, const uint8_t *x, int64_t stride, const Matrix *m, int panel, int add, float *out,
                        int64_t out_stride) {
    const float *w = (const float *)((const char *)m->weight + panel * panel_bytes(m));
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < COLUMNS; j++) {
            const float *row = (const float *)(x + r * stride);
            float sum = 0.0f, *to = out + r * out_stride + j;
            for (int k = 0; k < m->in; k++) sum = fmaf(row[k], w[k * COLUMNS + j], sum);
            sum += m->bias[panel * COLUMNS + j];
            *to = add ? sum + *to : sum;
        }
}
