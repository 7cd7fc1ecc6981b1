#include "entropy_kl.cuh"

namespace dtf {

DTF_DEFINE_CUDA_KERNEL(EntropyKLForward)
DTF_DEFINE_CUDA_KERNEL(EntropyKLBackward)

}  // namespace dtf
