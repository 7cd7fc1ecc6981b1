#include "random_start.cuh"

namespace dtf {

DTF_DEFINE_CUDA_KERNEL(RandomStart)

}  // namespace dtf
