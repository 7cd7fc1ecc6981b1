#include "../robust_loss.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CUDA, m) {
  m.impl("ce_loss", TORCH_BOX(&dtf::ce_loss<dtf::CUDA>));
  m.impl("trades_loss", TORCH_BOX(&dtf::trades_loss<dtf::CUDA>));
  m.impl("mart_loss", TORCH_BOX(&dtf::mart_loss<dtf::CUDA>));
}
