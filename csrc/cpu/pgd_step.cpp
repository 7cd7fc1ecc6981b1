#include <memory>

#include "kernels.h"
#include "reduce.h"

namespace dtf {
namespace {

template <int Bytes, typename T>
DTF_INLINE void linf(const PGDStepLinf<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using L = Lanes<A, Bytes>;
  const L step_size(k.step_size), epsilon(k.epsilon), lower(k.lower), upper(k.upper);
  for_lanes<L>(begin, end, [&](int64_t i, auto part) DTF_LAMBDA_INLINE {
    L adv = part.load(k.adv + i, A(0)), grad = part.load(k.grad + i, A(0)), clean = part.load(k.clean + i, A(0));
    part.store(k.adv + i, pgd_linf(adv, grad, clean, step_size, epsilon, lower, upper));
  });
}

template <int Bytes, typename T>
DTF_INLINE void l2(const PGDStepL2<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using L = Lanes<A, Bytes>;
  std::unique_ptr<A[]> delta(new A[k.size]);
  for (int64_t sample = begin; sample < end; ++sample) {
    T* adv = k.adv + sample * k.size;
    const T *grad = k.grad + sample * k.size, *clean = k.clean + sample * k.size;
    const L step(l2_step(A(k.step_size), l2_norm<Bytes>(grad, k.size)));
    SumOfSquares<Bytes> squares;
    for_lanes<L>(0, k.size, [&](int64_t i, auto part) DTF_LAMBDA_INLINE {
      L d = pgd_l2_delta(part.load(adv + i, A(0)), part.load(grad + i, A(0)), part.load(clean + i, A(0)), step);
      part.store(delta.get() + i, d);
      squares.add(d);
    });
    const L shrink(l2_shrink(A(k.epsilon), static_cast<A>(squares.norm()))), lower(k.lower), upper(k.upper);
    for_lanes<L>(0, k.size, [&](int64_t i, auto part) DTF_LAMBDA_INLINE {
      L d = part.load(delta.get() + i, A(0));
      part.store(adv + i, pgd_l2_project(part.load(clean + i, A(0)), d, shrink, lower, upper));
    });
  }
}

}  // namespace

DTF_DEFINE_KERNEL(PGDStepLinf, linf)
DTF_DEFINE_KERNEL(PGDStepL2, l2)

}  // namespace dtf
