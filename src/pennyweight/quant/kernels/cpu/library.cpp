// What the library says of itself and of the processor it runs on.

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define EXPORTED_PLAIN extern "C" __attribute__((visibility("default")))

// The digest of the sources and the commands it was built from.
EXPORTED_PLAIN const char *pennyweight_built_from() { return PENNYWEIGHT_BUILT_FROM; }

EXPORTED_PLAIN bool pennyweight_runs(const char *variant) {
    if (strcmp(variant, "plain") == 0) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (strcmp(variant, "avx2") == 0) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (strcmp(variant, "avx512") == 0) return avx512;
    // Asked of the processor itself: older compilers do not know the name.
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (strcmp(variant, "avx512_bf16") == 0)
        return avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#elif defined(__aarch64__)
    if (strcmp(variant, "neon") == 0) return true;
#endif
    return false;
}
