#include "../../cpu/level.h"

#include <string>

#include "../tensor.h"

namespace dtf {
namespace {

std::string level() { return simd_level(); }

}  // namespace
}  // namespace dtf

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CompositeExplicitAutograd, m) { m.impl("simd_level", TORCH_BOX(&dtf::level)); }
