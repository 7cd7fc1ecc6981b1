// lambda(x) of D-TRADES.
#pragma once

#include "tensor.h"

namespace dtf {

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> lambda_x(Tensor clean_logits, Tensor grad, double alpha, double beta, double base,
                                            double minimum, double maximum) {
  check_logits("clean_logits", clean_logits);
  check_rows("grad", grad, clean_logits, clean_logits.scalar_type());
  clean_logits = as_contiguous(clean_logits);
  if (!is_dense_per_sample(grad)) grad = as_contiguous(grad);
  const int64_t samples = clean_logits.size(0), classes = clean_logits.size(1), size = sample_size(grad);
  Tensor value = new_rows(grad, {samples}), entropy = new_rows(grad, {samples}),
         sensitivity = new_rows(grad, {samples});
  visit_dtype("clean_logits", clean_logits, [&]<typename T>() {
    using A = Compute<T>;
    Device::launch(clean_logits,
                   LambdaX<T>{in<T>(clean_logits), in<T>(grad), out<A>(value), out<A>(entropy), out<A>(sensitivity),
                              classes, size, alpha, beta, base, minimum, maximum},
                   samples, classes + size);
  });
  return {value, entropy, sensitivity};
}

}  // namespace dtf
