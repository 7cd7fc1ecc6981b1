#include "cuda/boosted_ce.cuh"

#include "driver.h"

namespace dtf::simt {

DTF_OPERATOR(BoostedCE, logits, labels, loss, grad, classes, slack);

}  // namespace dtf::simt
