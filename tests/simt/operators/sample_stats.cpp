#include "cuda/sample_stats.cuh"

#include "driver.h"

namespace dtf::simt {

DTF_OPERATOR(SampleStats, grad, adv, clean, l2, l1, linf, fosc, size, epsilon, lower, upper);

}  // namespace dtf::simt
