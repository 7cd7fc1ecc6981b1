// Per-sample sums.
#pragma once

#include "simd.h"

namespace dtf {

// Sum of squares in double, so that float gradients of 1e-25 or 1e25 have a norm. Sixteen partial sums either way.
template <int Bytes>
struct SumOfSquares {
  using D = Lanes<double, Bytes>;
  D low{0.0}, high{0.0};

  DTF_INLINE void add(D x) { low = low + x * x; }
  DTF_INLINE void add(Lanes<float, Bytes> x) {
    constexpr int parts = D::parts;
    D a, b;
    DTF_EACH_PART(a.part[p] = widen(x.part[p / 2], p % 2));
    DTF_EACH_PART(b.part[p] = widen(x.part[(parts + p) / 2], (parts + p) % 2));
    low = low + a * a;
    high = high + b * b;
  }
  DTF_INLINE double norm() const { return __builtin_sqrt(sum(low + high)); }

 private:
  using Float = typename Lanes<float, Bytes>::Native;
  // The lower or the upper half of a register of floats.
  static DTF_INLINE typename D::Native widen(Float x, int upper) {
    using Half [[gnu::vector_size(Bytes / 2)]] = float;
    Half halves[2];
    std::memcpy(halves, &x, sizeof halves);
    return __builtin_convertvector(halves[upper], typename D::Native);
  }
};

// L2 norm of `size` elements.
template <int Bytes, typename T>
DTF_INLINE Compute<T> l2_norm(const T* x, int64_t size) {
  using A = Compute<T>;
  SumOfSquares<Bytes> squares;
  for_lanes<Lanes<A, Bytes>>(0, size,
                             [&](int64_t i, auto part) DTF_LAMBDA_INLINE { squares.add(part.load(x + i, A(0))); });
  return static_cast<A>(squares.norm());
}

}  // namespace dtf
