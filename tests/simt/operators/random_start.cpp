#include "cuda/random_start.cuh"

#include "driver.h"

namespace dtf::simt {

DTF_OPERATOR(RandomStart, clean, index, start, size, kind, radius, lower, upper, key);

}  // namespace dtf::simt
