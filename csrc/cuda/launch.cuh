// Launch geometry: how many blocks of how many threads a kernel gets.
#pragma once

#include "gpu_compat.cuh"
#include "kernels.h"

namespace dtf {

constexpr int kWarp = 32;
// Dynamic shared memory of a block: every GPU grants 48 KiB without being asked, of which reductions use some.
constexpr int64_t kMaxSharedBytes = 47 * 1024;

DTF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enough blocks for `units` pieces of work, `per_block` each, but at least one and not more than the queue allows: the
// kernels stride over what is left.
inline int64_t grid_for(int64_t units, int64_t per_block, const Queue& queue) {
  const int64_t blocks = ceil_div(units, per_block);
  return blocks < 1 ? 1 : blocks < queue.max_blocks ? blocks : queue.max_blocks;
}

// Defines launch() of a kernel whose enqueue(arguments, count, queue) picks geometry and template parameters.
#define DTF_DEFINE_CUDA_KERNEL_FOR(Kernel, T)                                 \
  int launch(const Kernel<T>& arguments, int64_t count, const Queue& queue) { \
    if (count > 0) enqueue(arguments, count, queue);                          \
    return last_error();                                                      \
  }
#define DTF_DEFINE_CUDA_KERNEL(Kernel)       \
  DTF_DEFINE_CUDA_KERNEL_FOR(Kernel, float)  \
  DTF_DEFINE_CUDA_KERNEL_FOR(Kernel, double) \
  DTF_DEFINE_CUDA_KERNEL_FOR(Kernel, Half)   \
  DTF_DEFINE_CUDA_KERNEL_FOR(Kernel, BFloat16)

}  // namespace dtf
