// Elements of images in global memory, 16 bytes at a time where the pointers allow it.
#pragma once

#include "reduce.cuh"

namespace dtf {

// Values as they are computed with, and how `width` of them are read and written.
template <typename A, int width>
struct Values {
  A value[width];

  DTF_DEVICE A& operator[](int i) { return value[i]; }
  DTF_DEVICE const A& operator[](int i) const { return value[i]; }
};
// As many elements as 16 bytes hold: one access where the address is a multiple of 16 bytes, else one for each.
template <typename T>
struct Pack {
  static constexpr int width = 16 / sizeof(T);
  using A = Compute<T>;
  bool aligned;

  DTF_DEVICE Values<A, width> load(const T* from) const {
    T stored[width];
    if (aligned) {
      const Bits128 bits = *reinterpret_cast<const Bits128*>(from);
      __builtin_memcpy(stored, &bits, sizeof bits);
    } else {
      DTF_UNROLL for (int i = 0; i < width; ++i) stored[i] = from[i];
    }
    Values<A, width> x;
    DTF_UNROLL for (int i = 0; i < width; ++i) x[i] = widen(stored[i]);
    return x;
  }
  DTF_DEVICE void store(T* to, const Values<A, width>& x) const {
    T stored[width];
    DTF_UNROLL for (int i = 0; i < width; ++i) narrow(x[i], stored[i]);
    if (aligned) {
      Bits128 bits;
      __builtin_memcpy(&bits, stored, sizeof bits);
      store128(to, bits);
    } else {
      DTF_UNROLL for (int i = 0; i < width; ++i) to[i] = stored[i];
    }
  }
};
// One element, at any address.
template <typename T>
struct Single {
  static constexpr int width = 1;
  using A = Compute<T>;

  static DTF_DEVICE Values<A, 1> load(const T* from) { return {{widen(*from)}}; }
  static DTF_DEVICE void store(T* to, const Values<A, 1>& x) { narrow(x[0], *to); }
};

// Values in shared memory, 16 bytes at a time where there are as many: `i` is then a multiple of `width`.
template <typename A, int width>
struct alignas(width * sizeof(A) < 16 ? width * sizeof(A) : 16) SharedValues : Values<A, width> {};
template <typename A, int width>
DTF_DEVICE void put(A* to, const Values<A, width>& x) {
  reinterpret_cast<SharedValues<A, width>*>(to)->Values<A, width>::operator=(x);
}
template <typename A, int width>
DTF_DEVICE Values<A, width> get(const A* from) {
  return *reinterpret_cast<const SharedValues<A, width>*>(from);
}

template <typename... P>
DTF_DEVICE bool aligned(P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// Calls f(i, access) for the elements i, i + 1, ... i + access.width - 1 that are this thread's, of `size` that
// `threads` threads share: packs, and the few that fill none one by one. Which are whose does not depend on alignment,
// so neither do sums.
template <typename T, typename F>
DTF_DEVICE void for_elements(int64_t size, bool all_aligned, int64_t thread, int64_t threads, F f) {
  constexpr int width = Pack<T>::width;
  const int64_t packs = size / width;
  for (int64_t pack = thread; pack < packs; pack += threads) f(pack * width, Pack<T>{all_aligned});
  const int64_t last = packs * width + thread;  // there are more threads than elements left
  if (last < size) f(last, Single<T>{});
}

// ---- a block per sample -----------------------------------------------------------------------------------------

// Small images get small blocks, so that several run beside each other.
template <int threads_>
struct SampleBlock {
  static constexpr int threads = threads_;
};
template <typename F>
void with_sample_block(int64_t size, F f) {
  if (size <= 16384) return f(SampleBlock<256>{});
  f(SampleBlock<1024>{});
}
// Queues a kernel over samples, in blocks of that size.
template <typename Block, typename Arguments>
void start_samples(Block, void (*kernel)(Arguments, int64_t), const Arguments& k, int64_t samples, const Queue& queue,
                   int64_t shared_bytes = 0) {
  start(kernel, Geometry{grid_for(samples, 1, queue), 1, Block::threads, shared_bytes}, queue.stream, k, samples);
}
template <typename Body>
DTF_DEVICE void for_samples(int64_t samples, Body body) {
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) body(sample);
}

// Squares are summed in double, so that a gradient of 1e-30 has a norm.
template <int threads, typename A>
DTF_DEVICE A norm_of(double sum_of_squares) {
  return static_cast<A>(sqrt(reduce<threads>(sum_of_squares, Add{})));
}
template <typename A, int width>
DTF_DEVICE double add_squares(double sum, const Values<A, width>& x) {
  DTF_UNROLL for (int i = 0; i < width; ++i) sum = sum + static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}
// L2 norm of one sample; all threads of the block get it.
template <typename T, typename Block>
DTF_DEVICE Compute<T> l2_norm(const T* sample, int64_t size) {
  double squares = 0;
  for_elements<T>(size, aligned(sample), threadIdx.x, Block::threads,
                  [&](int64_t i, auto access) { squares = add_squares(squares, access.load(sample + i)); });
  return norm_of<Block::threads, Compute<T>>(squares);
}

}  // namespace dtf
