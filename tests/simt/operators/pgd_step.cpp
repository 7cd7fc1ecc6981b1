#include "cuda/pgd_step.cuh"

#include "driver.h"

namespace dtf::simt {

DTF_OPERATOR(PGDStepLinf, adv, grad, clean, size, step_size, epsilon, lower, upper);
DTF_OPERATOR(PGDStepL2, adv, grad, clean, size, step_size, epsilon, lower, upper);

}  // namespace dtf::simt
