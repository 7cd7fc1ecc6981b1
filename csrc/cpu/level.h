// The x86-64 levels that every kernel is compiled for, and which of them this machine runs.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DTF_HAS_LEVELS 1
#define DTF_V4 __attribute__((target("arch=x86-64-v4")))
#define DTF_V3 __attribute__((target("arch=x86-64-v3")))
#else
#define DTF_HAS_LEVELS 0
#endif

namespace dtf {

enum class Level { baseline, v3, v4 };

// The best level of this machine, or DTRADES_FAST_SIMD where that names a lower one.
Level best_level();
// Its name: "x86-64-v4" (AVX-512), "x86-64-v3" (AVX2), "x86-64 baseline" (SSE2) or "compiler default".
const char* simd_level();

}  // namespace dtf
