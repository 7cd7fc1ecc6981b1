// Per-sample figures of an input gradient.
#pragma once

#include "tensor.h"

namespace dtf {

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> sample_stats(Tensor grad, Tensor adv, Tensor clean, double epsilon,
                                                        double lower, double upper) {
  check_same("adv", adv, grad);
  check_same("clean", clean, grad);
  if (!walk_together({&grad, &adv, &clean}))
    grad = as_contiguous(grad), adv = as_contiguous(adv), clean = as_contiguous(clean);
  const int64_t samples = grad.size(0), size = sample_size(grad);
  Tensor l2 = new_rows(grad, {samples}), l1 = new_rows(grad, {samples}), linf = new_rows(grad, {samples}),
         fosc = new_rows(grad, {samples});
  visit_dtype("grad", grad, [&]<typename T>() {
    using A = Compute<T>;
    Device::launch(grad,
                   SampleStats<T>{in<T>(grad), in<T>(adv), in<T>(clean), out<A>(l2), out<A>(l1), out<A>(linf),
                                  out<A>(fosc), size, epsilon, lower, upper},
                   samples, size);
  });
  return {l2, l1, linf, fosc};
}

}  // namespace dtf
