#include "pgd_step.cuh"

namespace dtf {

DTF_DEFINE_CUDA_KERNEL(PGDStepLinf)
DTF_DEFINE_CUDA_KERNEL(PGDStepL2)

}  // namespace dtf
