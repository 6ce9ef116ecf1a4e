/* The limits of a CPU that bench/limits.py measures: reading weights from memory, and multiplying bytes in registers. */
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>

#define MOST_THREADS 64

typedef struct {
    const char *bytes;
    int64_t count, sum; /* bytes to read, or rounds of products */
} Part;

static void *read_part(void *argument) {
    Part *p = argument;
    const __m512i *v = (const __m512i *)p->bytes;
    __m512i sum[4] = {0};
    for (int64_t i = 0; i + 4 <= p->count / 64; i += 4)
        for (int j = 0; j < 4; j++) sum[j] = _mm512_xor_si512(sum[j], v[i + j]);
    for (int j = 0; j < 4; j++) p->sum ^= _mm512_reduce_add_epi64(sum[j]);
    return 0;
}

/* 20 independent sums, because the next product of a sum waits for the one before. */
static void *multiply_part(void *argument) {
    Part *p = argument;
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(1), total = a;
#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11) do(12) do(13) do(14) do(15) do(16) \
    do(17) do(18) do(19)
#define BEGIN(i) __m512i s##i = _mm512_set1_epi32((int)p->sum + i);
#define MULTIPLY(i) s##i = _mm512_dpbusd_epi32(s##i, a, b);
#define END(i) total = _mm512_add_epi32(total, s##i);
    EACH(BEGIN)
    for (int64_t n = 0; n < p->count; n++) {
        __asm__ volatile("" : "+v"(a)); /* or the compiler may move products out of the loop */
        EACH(MULTIPLY)
    }
    EACH(END)
    p->sum = _mm512_reduce_add_epi32(total);
    return 0;
}

static int64_t run(void *(*work)(void *), const char *bytes, int64_t count, int64_t apart, int threads) {
    pthread_t thread[MOST_THREADS];
    Part part[MOST_THREADS];
    int64_t sum = 0;
    for (int i = 0; i < threads; i++) part[i] = (Part){bytes + i * apart, count, i};
    for (int i = 1; i < threads; i++) pthread_create(&thread[i], 0, work, &part[i]);
    work(&part[0]);
    for (int i = 0; i < threads; i++) {
        if (i) pthread_join(thread[i], 0);
        sum += part[i].sum;
    }
    return sum; /* or the compiler may leave out the work */
}

/* Read ``size`` bytes from a multiple of 64 on, each thread a part. */
int64_t read_all(const char *bytes, int64_t size, int threads) {
    int64_t apart = size / threads / 64 * 64;
    return run(read_part, bytes, apart, apart, threads);
}

/* Each thread multiplies ``rounds`` x 20 x 64 pairs of bytes, and adds the products. */
int64_t multiply(int64_t rounds, int threads) { return run(multiply_part, 0, rounds, 0, threads); }
