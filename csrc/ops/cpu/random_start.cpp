#include "../random_start.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CPU, m) { m.impl("random_start", TORCH_BOX(&dtf::random_start<dtf::CPU>)); }
