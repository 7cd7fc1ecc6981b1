// Which instruction set the loader chose for the kernels marked DTF_CLONES.
#pragma once

namespace dtf {

const char* simd_level();

}  // namespace dtf
