#include "cuda/robust_loss.cuh"

#include "driver.h"

namespace dtf::simt {

DTF_OPERATOR(CELoss, logits, labels, loss, margin, grad, classes);
DTF_OPERATOR(TradesLoss, clean, adv, sensitivity, labels, loss, ce, kl, entropy, weight, margin, grad_clean, grad_adv,
             grad_sensitivity, classes, base, alpha, beta, minimum, maximum, entropy_gradient);
DTF_OPERATOR(MartLoss, clean, adv, labels, loss, bce, kl, weight, margin, grad_clean, grad_adv, classes, beta, slack,
             weight_slack);

}  // namespace dtf::simt
