// One PGD step, in place.
#pragma once

#include "tensor.h"

namespace dtf {

template <typename Device>
void pgd_step(Tensor adv, Tensor grad, Tensor clean, double step_size, double epsilon, double lower, double upper,
              std::string norm) {
  check_same("grad", grad, adv);
  check_same("clean", clean, adv);
  STD_TORCH_CHECK(norm == "linf" || norm == "l2", "norm must be 'linf' or 'l2'");
  // Without a common layout work on contiguous copies and write the result back.
  const bool in_place = walk_together({&adv, &grad, &clean});
  Tensor target = in_place ? adv : as_contiguous(adv);
  if (!in_place) grad = as_contiguous(grad), clean = as_contiguous(clean);
  const int64_t size = sample_size(adv), samples = adv.size(0);
  visit_dtype("adv", adv, [&]<typename T>() {
    PGDStep<T> step{out<T>(target), in<T>(grad), in<T>(clean), size, step_size, epsilon, lower, upper};
    if (norm == "linf")
      Device::launch(adv, PGDStepLinf<T>{step}, samples * size, 1, Split::at_vectors);
    else
      Device::launch(adv, PGDStepL2<T>{step}, samples, size);
  });
  if (!in_place && target.get() != adv.get()) torch::stable::copy_(adv, target);
}

}  // namespace dtf
