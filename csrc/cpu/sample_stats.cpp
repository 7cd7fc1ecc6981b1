#include "kernels.h"
#include "reduce.h"

namespace dtf {
namespace {

template <int Bytes, typename T>
DTF_INLINE void stats(const SampleStats<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using L = Lanes<A, Bytes>;
  const L epsilon(k.epsilon), lower(k.lower), upper(k.upper);
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t first = sample * k.size;
    SumOfSquares<Bytes> squares;
    L l1(0), linf(0), rise(0);
    for_lanes<L>(first, first + k.size, [&](int64_t i, auto part) DTF_LAMBDA_INLINE {
      L grad = part.load(k.grad + i, A(0)), adv = part.load(k.adv + i, A(0)), clean = part.load(k.clean + i, A(0));
      L size = abs(grad);
      squares.add(grad);
      l1 = l1 + size;
      linf = max(linf, size);
      rise = rise + fosc(grad, adv, clean, epsilon, lower, upper);
    });
    k.l2[sample] = static_cast<A>(squares.norm());
    k.l1[sample] = sum(l1);
    // max drops NaN, the sum does not
    k.linf[sample] = k.l1[sample] == k.l1[sample] ? maximum(linf) : k.l1[sample];
    k.fosc[sample] = sum(rise);
  }
}

}  // namespace

DTF_DEFINE_KERNEL(SampleStats, stats)

}  // namespace dtf
