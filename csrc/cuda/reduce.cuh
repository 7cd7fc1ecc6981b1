// Reductions over the threads that share a row or a sample, always in the same order.
#pragma once

#include "launch.cuh"

namespace dtf {

struct Add {
  template <typename V>
  DTF_DEVICE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  template <typename V>
  DTF_DEVICE V operator()(V a, V b) const {
    return max(a, b);
  }
};

// x[i] over `lanes` neighbouring threads; each of them gets the result. Up to a warp by shuffles alone; more lanes are
// a whole block, whose warps meet in shared memory.
template <int lanes, int n, typename V, typename Combine>
DTF_DEVICE void reduce(V (&x)[n], Combine combine) {
  constexpr int width = lanes < kWarp ? lanes : kWarp;
  DTF_UNROLL for (int offset = width / 2; offset > 0; offset /= 2) DTF_UNROLL for (int i = 0; i < n; ++i) x[i] =
      combine(x[i], shuffle_xor(x[i], offset));
  if constexpr (lanes > kWarp) {
    constexpr int warps = lanes / kWarp;
    DTF_SHARED(V, partial, n * warps);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    __syncthreads();  // what an earlier call left here has been read
    if (lane == 0) DTF_UNROLL for (int i = 0; i < n; ++i) partial[i * warps + warp] = x[i];
    __syncthreads();
    DTF_UNROLL for (int i = 0; i < n; ++i) x[i] = partial[i * warps + lane % warps];
    DTF_UNROLL for (int offset = warps / 2; offset > 0; offset /= 2) DTF_UNROLL for (int i = 0; i < n; ++i) x[i] =
        combine(x[i], shuffle_xor(x[i], offset));
  }
}
template <int lanes, typename V, typename Combine>
DTF_DEVICE V reduce(V x, Combine combine) {
  V one[1] = {x};
  reduce<lanes>(one, combine);
  return one[0];
}

}  // namespace dtf
