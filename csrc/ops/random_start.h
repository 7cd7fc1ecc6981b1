// Where an attack starts.
#pragma once

#include "tensor.h"

namespace dtf {

template <typename Device>
Tensor random_start(Tensor clean, Tensor index, std::string kind, double radius, double lower, double upper,
                    int64_t key) {
  check_rows("index", index, clean, ScalarType::Long);
  STD_TORCH_CHECK(kind == "linf" || kind == "l2" || kind == "gaussian", "kind must be 'linf', 'l2' or 'gaussian'");
  // The numbers follow the order [C, H, W] whatever the memory format, so they are drawn for the contiguous copy.
  Tensor source = as_contiguous(clean), start = new_like(source);
  index = as_contiguous(index);
  visit_dtype("clean", clean, [&]<typename T>() {
    const StartKind chosen = kind == "linf" ? StartKind::linf : kind == "l2" ? StartKind::l2 : StartKind::gaussian;
    Device::launch(clean,
                   RandomStart<T>{in<T>(source), in<int64_t>(index), out<T>(start), sample_size(clean), chosen, radius,
                                  lower, upper, static_cast<uint64_t>(key)},
                   clean.size(0), 4 * sample_size(clean));
  });
  if (clean.is_contiguous()) return start;
  Tensor result = new_like(clean);
  torch::stable::copy_(result, start);
  return result;
}

}  // namespace dtf
