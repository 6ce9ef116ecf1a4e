/* Replaces the intrinsics of AMX by plain C, and those of AVX-VNNI by AVX-512 VNNI, so that a CPU without them runs their kernels.
 * A product of tiles whose shapes do not fit aborts, as it faults on a CPU.
 *
 * Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", LDTILECFG, TILELOADD, TDPBUSD. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileConfig;

static _Thread_local TileConfig tile_config;
static _Thread_local uint8_t tile_rows[8][16][64];

static inline void must(int holds) {
    if (!holds) abort();
}
static inline void emulate_config(const void *config) {
    memcpy(&tile_config, config, sizeof(tile_config));
    memset(tile_rows, 0, sizeof(tile_rows));
    must(tile_config.palette == 1 && tile_config.start == 0);
    for (int i = 0; i < 16; i++) must(i < 8 ? tile_config.rows[i] <= 16 && tile_config.bytes[i] <= 64 : !tile_config.rows[i]);
}
static inline void emulate_release(void) { memset(&tile_config, 0, sizeof(tile_config)); }
static inline void emulate_zero(int tile) {
    must(tile_config.palette == 1);
    memset(tile_rows[tile], 0, sizeof(tile_rows[tile]));
}
static inline void emulate_load(int tile, const void *from, int64_t stride) {
    emulate_zero(tile);
    for (int r = 0; r < tile_config.rows[tile]; r++) memcpy(tile_rows[tile][r], (const char *)from + r * stride, tile_config.bytes[tile]);
}
static inline void emulate_store(int tile, void *to, int64_t stride) {
    must(tile_config.palette == 1);
    for (int r = 0; r < tile_config.rows[tile]; r++) memcpy((char *)to + r * stride, tile_rows[tile][r], tile_config.bytes[tile]);
}
static inline void emulate_product(int to, int a, int b, int is_signed) {
    const TileConfig *c = &tile_config;
    must(c->palette == 1 && c->rows[to] == c->rows[a] && c->bytes[to] == c->bytes[b] && c->bytes[a] == 4 * c->rows[b]);
    for (int row = 0; row < c->rows[to]; row++)
        for (int column = 0; column < c->bytes[to] / 4; column++) {
            int32_t sum;
            memcpy(&sum, tile_rows[to][row] + 4 * column, 4);
            for (int k = 0; k < c->bytes[a]; k++) {
                uint8_t x = tile_rows[a][row][k];
                sum += (is_signed ? (int8_t)x : x) * (int8_t)tile_rows[b][k / 4][4 * column + k % 4];
            }
            memcpy(tile_rows[to][row] + 4 * column, &sum, 4);
        }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbusd
#undef _tile_dpbssd
#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpwssd_avx_epi32
#define _tile_loadconfig(config) emulate_config(config)
#define _tile_release() emulate_release()
#define _tile_zero(tile) emulate_zero(tile)
#define _tile_loadd(tile, from, stride) emulate_load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulate_store(tile, to, stride)
#define _tile_dpbusd(to, a, b) emulate_product(to, a, b, 0)
#define _tile_dpbssd(to, a, b) emulate_product(to, a, b, 1)
#define _mm256_dpbusd_avx_epi32(sum, a, b) _mm256_dpbusd_epi32(sum, a, b)
#define _mm256_dpwssd_avx_epi32(sum, a, b) _mm256_dpwssd_epi32(sum, a, b)
