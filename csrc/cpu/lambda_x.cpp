#include "kernels.h"
#include "reduce.h"
#include "rows.h"

namespace dtf {
namespace {

template <int Bytes, typename T>
DTF_INLINE Compute<T> row_entropy(const T* row, int64_t classes) {
  using A = Compute<T>;
  using L = Lanes<A, Bytes>;
  constexpr A nothing = -std::numeric_limits<A>::infinity();
  const L m = L::all(row_maximum<L>(row, classes));
  EntropySums<L> lanes;
  for_lanes<L>(0, classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE { lanes.add(part.load(row + c, nothing) - m); });
  return EntropySums<A>{sum(lanes.exp_sum), sum(lanes.shift)}.entropy();
}

template <int Bytes, typename T>
DTF_INLINE void lambda(const LambdaX<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  const Weighting<A> lambda{A(k.base), A(k.alpha), A(k.beta), A(k.minimum), A(k.maximum)};
  for (int64_t sample = begin; sample < end; ++sample) {
    A entropy = row_entropy<Bytes>(k.logits + sample * k.classes, k.classes);
    A sensitivity = l2_norm<Bytes>(k.grad + sample * k.size, k.size);
    k.entropy[sample] = entropy;
    k.sensitivity[sample] = sensitivity;
    k.value[sample] = lambda.clip(lambda.unclipped(entropy, sensitivity));
  }
}

}  // namespace

DTF_DEFINE_KERNEL(LambdaX, lambda)

}  // namespace dtf
