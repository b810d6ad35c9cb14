// What the library says of itself and of the processor it runs on.

#include <string.h>

#define EXPORTED_PLAIN extern "C" __attribute__((visibility("default")))

// The digest of the sources and the commands it was built from.
EXPORTED_PLAIN const char *pennyweight_built_from() { return PENNYWEIGHT_BUILT_FROM; }

EXPORTED_PLAIN bool pennyweight_runs(const char *variant) {
    if (strcmp(variant, "plain") == 0) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (strcmp(variant, "avx2") == 0) return avx2;
    if (strcmp(variant, "avx512") == 0)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__aarch64__)
    if (strcmp(variant, "neon") == 0) return true;
#endif
    return false;
}
