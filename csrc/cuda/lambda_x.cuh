// lambda(x) of D-TRADES from logits and input gradient: a block per sample computes entropy, norm and weight in one
// launch.
#pragma once

#include "elements.cuh"
#include "rows.cuh"

namespace dtf {

template <typename T, typename Block>
DTF_KERNEL(Block::threads)
lambda_x(LambdaX<T> k, int64_t samples) {
  using A = Compute<T>;
  using Shape = RowShape<Block::threads, 0>;
  const int classes = static_cast<int>(k.classes);
  for_samples(samples, [&](int64_t sample) {
    const Row<T, Shape> logits(k.logits, sample, classes, true);
    const A maximum = over_classes<Shape>(classes, A(-INFINITY), logits, Max{});
    EntropySums<A> lane;
    for_classes<Shape>(classes, [&](int c, int item) { lane.add(logits(c, item) - maximum); });
    A sum[2] = {lane.exp_sum, lane.shift};
    reduce<Block::threads>(sum, Add{});
    const A entropy = EntropySums<A>{sum[0], sum[1]}.entropy();
    const A sensitivity = l2_norm<T, Block>(k.grad + sample * k.size, k.size);
    if (threadIdx.x == 0) {
      k.entropy[sample] = entropy;
      k.sensitivity[sample] = sensitivity;
      const Weighting<A> lambda{A(k.base), A(k.alpha), A(k.beta), A(k.minimum), A(k.maximum)};
      k.value[sample] = lambda.clip(lambda.unclipped(entropy, sensitivity));
    }
  });
}

template <typename T>
void enqueue(const LambdaX<T>& k, int64_t samples, const Queue& queue) {
  with_sample_block(k.size,
                    [&](auto block) { start_samples(block, &lambda_x<T, decltype(block)>, k, samples, queue); });
}

}  // namespace dtf
