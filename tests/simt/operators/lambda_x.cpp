#include "cuda/lambda_x.cuh"

#include "driver.h"

namespace dtf::simt {

DTF_OPERATOR(LambdaX, logits, grad, value, entropy, sensitivity, classes, size, alpha, beta, base, minimum, maximum);

}  // namespace dtf::simt
