#include "../sample_stats.h"

#include "device.h"

STABLE_TORCH_LIBRARY_IMPL(dtrades_fast, CPU, m) { m.impl("sample_stats", TORCH_BOX(&dtf::sample_stats<dtf::CPU>)); }
