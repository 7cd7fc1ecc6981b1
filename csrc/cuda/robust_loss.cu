#include "robust_loss.cuh"

namespace dtf {

DTF_DEFINE_CUDA_KERNEL(CELoss)
DTF_DEFINE_CUDA_KERNEL(TradesLoss)
DTF_DEFINE_CUDA_KERNEL(MartLoss)

}  // namespace dtf
