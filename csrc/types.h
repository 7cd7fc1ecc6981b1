// The storage types of tensors and the types that they are computed in, on every device.
#pragma once

#include <cstdint>

namespace dtf {

// Storage of half precision: the bits; all arithmetic happens in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type that T is computed in.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

}  // namespace dtf
