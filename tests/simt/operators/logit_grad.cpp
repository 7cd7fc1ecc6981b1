#include "cuda/logit_grad.cuh"

#include "driver.h"

namespace dtf::simt {

DTF_OPERATOR(LogitGradKL, adv, clean_log_probs, grad, classes);
DTF_OPERATOR(LogitGradCE, logits, labels, grad, classes);

}  // namespace dtf::simt
