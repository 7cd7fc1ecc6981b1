// Norms of each sample's gradient and its first-order stationary condition: a block per sample, one read of each input.
#pragma once

#include "elements.cuh"

namespace dtf {

template <typename T, typename Block>
DTF_KERNEL(Block::threads)
sample_stats(SampleStats<T> k, int64_t samples) {
  using A = Compute<T>;
  const A epsilon = A(k.epsilon), lower = A(k.lower), upper = A(k.upper);
  for_samples(samples, [&](int64_t sample) {
    const T *grad = k.grad + sample * k.size, *adv = k.adv + sample * k.size, *clean = k.clean + sample * k.size;
    double squares = 0;
    A sum[2] = {A(0), A(0)};  // of |g|, of the stationary condition
    A largest = A(0);
    for_elements<T>(k.size, aligned(grad, adv, clean), threadIdx.x, Block::threads, [&](int64_t i, auto access) {
      const auto g = access.load(grad + i), x = access.load(adv + i), c = access.load(clean + i);
      squares = add_squares(squares, g);
      DTF_UNROLL for (int j = 0; j < access.width; ++j) {
        sum[0] = sum[0] + abs(g[j]);
        sum[1] = sum[1] + fosc(g[j], x[j], c[j], epsilon, lower, upper);
        largest = max(largest, abs(g[j]));
      }
    });
    const A l2 = norm_of<Block::threads, A>(squares);
    reduce<Block::threads>(sum, Add{});
    largest = reduce<Block::threads>(largest, Max{});
    if (threadIdx.x == 0) {
      k.l2[sample] = l2;
      k.l1[sample] = sum[0];
      k.linf[sample] = select(sum[0] == sum[0], largest, sum[0]);  // max drops NaN, the sum does not
      k.fosc[sample] = sum[1];
    }
  });
}

template <typename T>
void enqueue(const SampleStats<T>& k, int64_t samples, const Queue& queue) {
  with_sample_block(k.size,
                    [&](auto block) { start_samples(block, &sample_stats<T, decltype(block)>, k, samples, queue); });
}

}  // namespace dtf
