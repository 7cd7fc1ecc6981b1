#include "logit_grad.cuh"

namespace dtf {

DTF_DEFINE_CUDA_KERNEL(LogitGradKL)
DTF_DEFINE_CUDA_KERNEL(LogitGradCE)

}  // namespace dtf
