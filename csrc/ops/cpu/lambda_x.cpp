#include "dispatch.h"

namespace dtf {
namespace {

std::tuple<Tensor, Tensor, Tensor> lambda_x_cpu(Tensor clean_logits, Tensor grad, double alpha, double beta,
                                                double base, double minimum, double maximum) {
  check_logits("clean_logits", clean_logits);
  check_rows("grad", grad, clean_logits, clean_logits.scalar_type());
  clean_logits = as_contiguous(clean_logits);
  if (!is_dense_per_sample(grad)) grad = as_contiguous(grad);
  const int64_t samples = clean_logits.size(0), classes = clean_logits.size(1), size = sample_size(grad);
  Tensor value = new_rows(grad, {samples}), entropy = new_rows(grad, {samples}),
         sensitivity = new_rows(grad, {samples});
  visit_dtype("clean_logits", clean_logits, [&]<typename T>() {
    using A = Compute<T>;
    launch(LambdaX<T>{in<T>(clean_logits), in<T>(grad), out<A>(value), out<A>(entropy), out<A>(sensitivity), classes,
                      size, alpha, beta, base, minimum, maximum},
           samples, classes + size);
  });
  return {value, entropy, sensitivity};
}

}  // namespace
}  // namespace dtf

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CPU, m) { m.impl("lambda_x", TORCH_BOX(&dtf::lambda_x_cpu)); }
