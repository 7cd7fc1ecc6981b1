#include "dispatch.h"

namespace dtf {
namespace {

void pgd_step_cpu(Tensor adv, Tensor grad, Tensor clean, double step_size, double epsilon, double lower, double upper,
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
      launch(PGDStepLinf<T>{step}, samples * size, 1, Lanes<Compute<T>>::width);
    else
      launch(PGDStepL2<T>{step}, samples, size);
  });
  if (!in_place && target.get() != adv.get()) torch::stable::copy_(adv, target);
}

}  // namespace
}  // namespace dtf

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CPU, m) { m.impl("pgd_step_", TORCH_BOX(&dtf::pgd_step_cpu)); }
