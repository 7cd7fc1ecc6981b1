#include "sample_stats.cuh"

namespace dtf {

DTF_DEFINE_CUDA_KERNEL(SampleStats)

}  // namespace dtf
