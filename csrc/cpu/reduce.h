// Per-sample sums.
#pragma once

#include "simd.h"

namespace dtf {

// Sum of squares in double, so that float gradients of 1e-25 or 1e25 have a norm.
struct SumOfSquares {
  Lanes<double> low{0.0}, high{0.0};

  DTF_INLINE void add(Lanes<double> x) { low = low + x * x; }
  DTF_INLINE void add(Lanes<float> x) {
    using Eight [[gnu::vector_size(32)]] = float;
    Eight halves[2];
    std::memcpy(halves, &x.v, sizeof halves);
    Lanes<double> a(__builtin_convertvector(halves[0], Lanes<double>::Native));
    Lanes<double> b(__builtin_convertvector(halves[1], Lanes<double>::Native));
    low = low + a * a;
    high = high + b * b;
  }
  DTF_INLINE double norm() const { return __builtin_sqrt(sum(low + high)); }
};

// L2 norm of `size` elements.
template <typename T>
DTF_INLINE Compute<T> l2_norm(const T* x, int64_t size) {
  using A = Compute<T>;
  SumOfSquares squares;
  for_lanes<A>(0, size, [&](int64_t i, auto part) DTF_LAMBDA_INLINE { squares.add(part.load(x + i, A(0))); });
  return static_cast<A>(squares.norm());
}

}  // namespace dtf
