#include "level.h"

#include <cstdlib>
#include <cstring>

namespace dtf {
namespace {

Level detect() {
#if DTF_HAS_LEVELS
  const char* wanted = std::getenv("DTRADES_FAST_SIMD");
  auto allowed = [&](const char* name) {
    return wanted == nullptr || *wanted == '\0' || std::strcmp(name, wanted) <= 0;
  };
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4") && allowed("x86-64-v4")) return Level::v4;
  if (__builtin_cpu_supports("x86-64-v3") && allowed("x86-64-v3")) return Level::v3;
#endif
  return Level::baseline;
}

}  // namespace

Level best_level() {
  static const Level best = detect();
  return best;
}

const char* simd_level() {
#if DTF_HAS_LEVELS
  return best_level() == Level::v4 ? "x86-64-v4" : best_level() == Level::v3 ? "x86-64-v3" : "x86-64 baseline";
#else
  return "compiler default";
#endif
}

}  // namespace dtf
