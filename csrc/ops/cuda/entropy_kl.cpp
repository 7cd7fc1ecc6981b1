#include "../entropy_kl.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CUDA, m) {
  m.impl("entropy_kl", TORCH_BOX(&dtf::entropy_kl<dtf::CUDA>));
  m.impl("entropy_kl_backward", TORCH_BOX(&dtf::entropy_kl_backward<dtf::CUDA>));
}
