#include "level.h"

#include "simd.h"

namespace dtf {

// Versions of one function, chosen as the clones of the kernels are. They must be called from this file: other files
// see only the default version.
#if DTF_HAS_CLONES
__attribute__((target("arch=x86-64-v4"))) const char* level() { return "x86-64-v4"; }
__attribute__((target("arch=x86-64-v3"))) const char* level() { return "x86-64-v3"; }
__attribute__((target("default"))) const char* level() { return "x86-64 baseline"; }
#else
const char* level() { return "compiler default"; }
#endif

const char* simd_level() { return level(); }

}  // namespace dtf
