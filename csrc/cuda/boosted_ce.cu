#include "boosted_ce.cuh"

namespace dtf {

DTF_DEFINE_CUDA_KERNEL(BoostedCE)

}  // namespace dtf
