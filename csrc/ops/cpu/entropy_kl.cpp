#include "../entropy_kl.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CPU, m) {
  m.impl("entropy_kl", TORCH_BOX(&dtf::entropy_kl<dtf::CPU>));
  m.impl("entropy_kl_backward", TORCH_BOX(&dtf::entropy_kl_backward<dtf::CPU>));
}
