#include "../pgd_step.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CUDA, m) { m.impl("pgd_step_", TORCH_BOX(&dtf::pgd_step<dtf::CUDA>)); }
