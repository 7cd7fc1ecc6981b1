#include "../logit_grad.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CPU, m) {
  m.impl("logit_grad_kl", TORCH_BOX(&dtf::logit_grad_kl<dtf::CPU>));
  m.impl("logit_grad_ce", TORCH_BOX(&dtf::logit_grad_ce<dtf::CPU>));
}
