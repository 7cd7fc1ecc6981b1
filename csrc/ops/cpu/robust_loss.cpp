#include "../robust_loss.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CPU, m) {
  m.impl("ce_loss", TORCH_BOX(&dtf::ce_loss<dtf::CPU>));
  m.impl("trades_loss", TORCH_BOX(&dtf::trades_loss<dtf::CPU>));
  m.impl("mart_loss", TORCH_BOX(&dtf::mart_loss<dtf::CPU>));
}
