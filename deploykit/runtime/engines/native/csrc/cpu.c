/* Detect this CPU's instruction sets, and choose the table of kernels for new contexts. */
#include <stddef.h>
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

enum { AVX_STATE = 0x6, AVX512_STATE = 0xe6, TILE_STATE = 0x60000 };
enum { AVX_VNNI = 1 << 4, AMX = 1 << 24 | 1 << 25 }; /* tiles, and products of bytes */

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
#endif

/* The registers that the operating system saves (XCR0). */
static uint64_t saved_state(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

/* isa/avx2.c is compiled for x86-64-v3, so check all of it. */
static int has_avx2(void) {
    uint32_t a, b, c, d, first = bit_FMA | bit_F16C | bit_MOVBE, seventh = bit_AVX2 | bit_BMI | bit_BMI2;
    if ((saved_state() & AVX_STATE) != AVX_STATE) return 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first) return 0;
    if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || !(c & bit_LZCNT)) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & seventh) == seventh;
}

static int has_avxvnni(void) {
    uint32_t a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & AVX_VNNI);
}

/* isa/avx512.c is compiled for x86-64-v4. */
static int has_avx512(void) {
    uint32_t a, b, c, d, wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
    if (!has_avx2() || (saved_state() & AVX512_STATE) != AVX512_STATE) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & wanted) == wanted;
}

static int has_avx512vnni(void) {
    uint32_t a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & bit_AVX512VNNI);
}

/* Linux saves tile registers only for a process that requested it. Old kernels do not have this request. */
static int has_amx(void) {
#if defined(__linux__)
    uint32_t a, b, c, d;
    if (!has_avx512vnni() || (saved_state() & TILE_STATE) != TILE_STATE) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & AMX) != AMX) return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

/* On a CPU with several kinds of cores, Linux reports the features that all cores have. */
static int has_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
static int has_i8mm(void) { return has_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static int has(const char *feature) {
    int found = 0;
    size_t size = sizeof(found);
    return sysctlbyname(feature, &found, &size, NULL, 0) == 0 && found;
}
static int has_dotprod(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static int has_i8mm(void) { return has_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }
#endif

static int always(void) { return 1; }

/* Fastest first. */
static const struct {
    const Kernels *kernels;
    int (*runs)(void);
} TABLES[] = {
#if defined(__x86_64__)
    {&kernels_amx, has_amx},
    {&kernels_avx512vnni, has_avx512vnni},
    {&kernels_avx512, has_avx512},
    {&kernels_avxvnni, has_avxvnni},
    {&kernels_avx2, has_avx2},
#elif defined(__aarch64__)
    {&kernels_i8mm, has_i8mm},
    {&kernels_dotprod, has_dotprod},
    {&kernels_neon, always},
#endif
    {&kernels_scalar, always},
};

#define COUNT (int)(sizeof(TABLES) / sizeof(TABLES[0]))

static const Kernels *chosen;

const Kernels *chosen_kernels(void) {
    for (int i = 0; !chosen; i++)
        if (TABLES[i].runs()) chosen = TABLES[i].kernels;
    return chosen;
}

/* Return the kernels of this CPU's instruction set ``number``, fastest first; NULL after the last one. */
API const Kernels *deploykit_kernels(int number) {
    for (int i = 0; i < COUNT; i++)
        if (TABLES[i].runs() && number-- == 0) return TABLES[i].kernels;
    return NULL;
}

API const char *deploykit_isa(void) { return chosen_kernels()->name; }

/* Use the kernels ``name`` for new contexts. Returns 0 if this CPU has no such kernels. */
API int deploykit_choose_isa(const char *name) {
    const Kernels *kernels;
    for (int i = 0; (kernels = deploykit_kernels(i)); i++)
        if (!strcmp(kernels->name, name)) {
            chosen = kernels;
            return 1;
        }
    return 0;
}
