// How the operators run on the CPU: kernels of cpu/ on torch's threads.
#pragma once

#include "../../cpu/kernels.h"
#include "../tensor.h"

namespace dtf {

struct CPU {
  // Runs a kernel over [0, count), split between threads where there is enough work: about 32,000 elements each, as
  // much as pays for waking a thread.
  template <template <typename> class Kernel, typename T>
  static void launch(const Tensor&, const Kernel<T>& kernel, int64_t count, int64_t elements_each,
                     Split split = Split::anywhere) {
    if (count == 0) return;
    const int64_t multiple = split == Split::at_vectors ? 64 / sizeof(Compute<T>) : 1;
    const int64_t units = (count + multiple - 1) / multiple;
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_each * multiple));
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      run(kernel, begin * multiple, std::min(end * multiple, count));
    });
  }
};

}  // namespace dtf
