#include "../logit_grad.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CUDA, m) {
  m.impl("logit_grad_kl", TORCH_BOX(&dtf::logit_grad_kl<dtf::CUDA>));
  m.impl("logit_grad_ce", TORCH_BOX(&dtf::logit_grad_ce<dtf::CUDA>));
}
