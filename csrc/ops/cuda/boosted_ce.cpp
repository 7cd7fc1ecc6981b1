#include "../boosted_ce.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CUDA, m) { m.impl("boosted_ce", TORCH_BOX(&dtf::boosted_ce<dtf::CUDA>)); }
