// One step of PGD with its projection on ball and box, in place and in one launch.
//
// Linf works element by element: three reads, one write. L2 has a block per sample, which keeps the step in shared
// memory between its two norms, so that it reads gradient and image once each (larger samples read them again).
#pragma once

#include "elements.cuh"

namespace dtf {

constexpr int kElementThreads = 256;

template <typename T>
DTF_KERNEL(kElementThreads)
pgd_step_linf(PGDStepLinf<T> k, int64_t elements) {
  using A = Compute<T>;
  const A step_size = A(k.step_size), epsilon = A(k.epsilon), lower = A(k.lower), upper = A(k.upper);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  for_elements<T>(elements, aligned(k.adv, k.grad, k.clean), thread, static_cast<int64_t>(gridDim.x) * kElementThreads,
                  [&](int64_t i, auto access) {
                    auto adv = access.load(k.adv + i);
                    const auto grad = access.load(k.grad + i), clean = access.load(k.clean + i);
                    DTF_UNROLL for (int j = 0; j < access.width; ++j) adv[j] =
                        pgd_linf(adv[j], grad[j], clean[j], step_size, epsilon, lower, upper);
                    access.store(k.adv + i, adv);
                  });
}

// Whether a sample's step fits into shared memory.
template <typename T>
DTF_INLINE bool step_fits(int64_t size) {
  return size * static_cast<int64_t>(sizeof(Compute<T>)) <= kMaxSharedBytes;
}

template <typename T, typename Block>
DTF_KERNEL(Block::threads)
pgd_step_l2(PGDStepL2<T> k, int64_t samples) {
  using A = Compute<T>;
  DTF_DYNAMIC_SHARED(A, kept);  // each thread reads only what it wrote itself, in any sample: no barrier is needed
  const bool keep = Block::threads == 256 && step_fits<T>(k.size);  // larger blocks have samples that never fit
  for_samples(samples, [&](int64_t sample) {
    T* adv = k.adv + sample * k.size;
    const T *grad = k.grad + sample * k.size, *clean = k.clean + sample * k.size;
    const bool all_aligned = aligned(adv, grad, clean);
    auto for_own = [&](auto f) { for_elements<T>(k.size, all_aligned, threadIdx.x, Block::threads, f); };

    double squares = 0;
    for_own([&](int64_t i, auto access) {
      const auto g = access.load(grad + i);
      squares = add_squares(squares, g);
      if (keep) put(kept + i, g);
    });
    const A step = l2_step(A(k.step_size), norm_of<Block::threads, A>(squares));

    auto delta_at = [&](int64_t i, auto access, const auto& g) {
      const auto x = access.load(adv + i), c = access.load(clean + i);
      auto delta = g;
      DTF_UNROLL for (int j = 0; j < access.width; ++j) delta[j] = pgd_l2_delta(x[j], g[j], c[j], step);
      return delta;
    };
    squares = 0;
    for_own([&](int64_t i, auto access) {
      const auto delta = delta_at(i, access, keep ? get<A, access.width>(kept + i) : access.load(grad + i));
      squares = add_squares(squares, delta);
      if (keep) put(kept + i, delta);
    });
    const A shrink = l2_shrink(A(k.epsilon), norm_of<Block::threads, A>(squares));

    for_own([&](int64_t i, auto access) {
      const auto c = access.load(clean + i);
      auto x = keep ? get<A, access.width>(kept + i) : delta_at(i, access, access.load(grad + i));
      DTF_UNROLL for (int j = 0; j < access.width; ++j) x[j] =
          pgd_l2_project(c[j], x[j], shrink, A(k.lower), A(k.upper));
      access.store(adv + i, x);
    });
  });
}

template <typename T>
void enqueue(const PGDStepLinf<T>& k, int64_t elements, const Queue& queue) {
  const int64_t blocks = grid_for(elements, kElementThreads * Pack<T>::width, queue);
  start(&pgd_step_linf<T>, Geometry{blocks, 1, kElementThreads, 0}, queue.stream, k, elements);
}
template <typename T>
void enqueue(const PGDStepL2<T>& k, int64_t samples, const Queue& queue) {
  with_sample_block(k.size, [&](auto block) {
    const int64_t shared_bytes = step_fits<T>(k.size) ? k.size * static_cast<int64_t>(sizeof(Compute<T>)) : 0;
    start_samples(block, &pgd_step_l2<T, decltype(block)>, k, samples, queue, shared_bytes);
  });
}

}  // namespace dtf
