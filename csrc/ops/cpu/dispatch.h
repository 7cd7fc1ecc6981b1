// CPU kernels from tensors: dtype dispatch and threads.
#pragma once

#include "../../cpu/kernels.h"
#include "../../cpu/simd.h"
#include "../tensor.h"

namespace dtf {

// Calls f.operator()<T>() with the storage type of the tensor.
template <typename F>
auto visit_dtype(const char* name, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::Half:
      return f.template operator()<Half>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
  }
}

template <typename T>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Runs a kernel over [0, count), split between threads where there is enough work: about 32,000 elements each, as much
// as pays for waking a thread. `multiple` keeps the boundaries at full vectors.
template <typename Kernel>
void launch(const Kernel& kernel, int64_t count, int64_t elements_each, int64_t multiple = 1) {
  if (count == 0) return;
  const int64_t units = (count + multiple - 1) / multiple;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_each * multiple));
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    run(kernel, begin * multiple, std::min(end * multiple, count));
  });
}

}  // namespace dtf
