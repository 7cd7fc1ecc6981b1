// Random starting points of attacks. Every number is a function of key, sample index and element, so nothing depends on
// the launch; nothing random is ever stored: the L2 start draws its normals twice, for the norm and for the point.
#pragma once

#include "elements.cuh"

namespace dtf {

constexpr int kStartThreads = 256;
// What a thread draws at once: whole Philox blocks of four that also fill whole packs.
template <typename T>
constexpr int kDraw = Pack<T>::width < 4 ? 4 : Pack<T>::width;

// The upper 24 bits of words first ... first + n - 1 of a sample's stream.
template <typename A, int n>
DTF_DEVICE Values<A, n> draw_bits(int64_t first, uint32_t draw, int64_t index, uint64_t key) {
  Values<A, n> x;
  DTF_UNROLL for (int block = 0; block < n / 4; ++block) {
    uint32_t words[4];
    random_words(words, static_cast<uint32_t>(first / 4 + block), draw, index, key);
    DTF_UNROLL for (int w = 0; w < 4; ++w) x[4 * block + w] = static_cast<A>(static_cast<int32_t>(words[w] >> 8));
  }
  return x;
}
template <typename A, int n>
DTF_DEVICE Values<A, n> draw_normals(int64_t first, int64_t index, uint64_t key) {
  Values<A, n> x = draw_bits<A, n>(first, 0, index, key);
  DTF_UNROLL for (int i = 0; i < n; i += 2) {
    const Pair<A> pair = normals(x[i], x[i + 1]);
    x[i] = pair.first, x[i + 1] = pair.second;
  }
  return x;
}

// to[i] = f(from[i], i) for the n elements from `first` on, as far as they lie within the sample.
template <typename T, int n, typename F>
DTF_DEVICE void transform(const T* from, T* to, int64_t first, int64_t size, F f) {
  constexpr int width = Pack<T>::width;
  if (first + n <= size) {
    const Pack<T> pack{aligned(from, to)};
    DTF_UNROLL for (int i = 0; i < n; i += width) {
      auto x = pack.load(from + first + i);
      DTF_UNROLL for (int j = 0; j < width; ++j) x[j] = f(x[j], i + j);
      pack.store(to + first + i, x);
    }
  } else {  // at least the last one lies beyond
    DTF_UNROLL for (int i = 0; i < n - 1; ++i) if (first + i < size)
        narrow(f(widen(from[first + i]), i), to[first + i]);
  }
}

// Uniform in the Linf ball, or Gaussian: blockIdx.y is the sample, the threads of blockIdx.x share it.
template <typename T, bool gaussian>
DTF_KERNEL(kStartThreads)
random_start(RandomStart<T> k, int64_t samples) {
  using A = Compute<T>;
  constexpr int n = kDraw<T>;
  const A radius = A(k.radius), lower = A(k.lower), upper = A(k.upper);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kStartThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kStartThreads * n;
  for (int64_t sample = blockIdx.y; sample < samples; sample += gridDim.y) {
    const T* clean = k.clean + sample * k.size;
    T* out = k.start + sample * k.size;
    const int64_t index = k.index[sample];
    for (int64_t first = thread * n; first < k.size; first += stride) {
      if constexpr (gaussian) {
        const auto normal = draw_normals<A, n>(first, index, k.key);
        transform<T, n>(clean, out, first, k.size, [&](A x, int i) { return x + radius * normal[i]; });
      } else {
        const auto bits = draw_bits<A, n>(first, 0, index, k.key);
        transform<T, n>(clean, out, first, k.size,
                        [&](A x, int i) { return clamp(x + radius * uniform_symmetric(bits[i]), lower, upper); });
      }
    }
  }
}

// Uniform in the L2 ball: a block per sample.
template <typename T, typename Block>
DTF_KERNEL(Block::threads)
random_start_l2(RandomStart<T> k, int64_t samples) {
  using A = Compute<T>;
  constexpr int n = kDraw<T>;
  const A lower = A(k.lower), upper = A(k.upper);
  for_samples(samples, [&](int64_t sample) {
    const T* clean = k.clean + sample * k.size;
    T* out = k.start + sample * k.size;
    const int64_t index = k.index[sample], own = static_cast<int64_t>(threadIdx.x) * n;
    double squares = 0;
    for (int64_t first = own; first < k.size; first += Block::threads * n) {
      auto normal = draw_normals<A, n>(first, index, k.key);
      DTF_UNROLL for (int i = 0; i < n; ++i) normal[i] = select(first + i < k.size, normal[i], A(0));
      squares = add_squares(squares, normal);
    }
    const A norm = norm_of<Block::threads, A>(squares);
    const A radial = uniform_positive(draw_bits<A, 4>(0, 1, index, k.key)[0]);
    const A scale = l2_start_scale(A(k.radius), radial, static_cast<A>(k.size), norm);
    for (int64_t first = own; first < k.size; first += Block::threads * n) {
      const auto normal = draw_normals<A, n>(first, index, k.key);
      transform<T, n>(clean, out, first, k.size,
                      [&](A x, int i) { return clamp(x + normal[i] * scale, lower, upper); });
    }
  });
}

template <typename T>
void enqueue(const RandomStart<T>& k, int64_t samples, const Queue& queue) {
  if (k.kind == StartKind::l2) {
    with_sample_block(
        k.size, [&](auto block) { start_samples(block, &random_start_l2<T, decltype(block)>, k, samples, queue); });
    return;
  }
  const Geometry geometry{grid_for(k.size, kStartThreads * kDraw<T>, queue), grid_for(samples, 1, queue), kStartThreads,
                          0};
  if (k.kind == StartKind::gaussian)
    start(&random_start<T, true>, geometry, queue.stream, k, samples);
  else
    start(&random_start<T, false>, geometry, queue.stream, k, samples);
}

}  // namespace dtf
