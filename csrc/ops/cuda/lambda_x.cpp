#include "../lambda_x.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CUDA, m) { m.impl("lambda_x", TORCH_BOX(&dtf::lambda_x<dtf::CUDA>)); }
