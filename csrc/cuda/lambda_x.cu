#include "lambda_x.cuh"

namespace dtf {

DTF_DEFINE_CUDA_KERNEL(LambdaX)

}  // namespace dtf
