// Every CPU kernel: run(arguments, begin, end) works on a range of rows, samples or elements.
#pragma once

#include "../arguments.h"

#define DTF_DECLARE_KERNEL(Kernel)                   \
  void run(const Kernel<float>&, int64_t, int64_t);  \
  void run(const Kernel<double>&, int64_t, int64_t); \
  void run(const Kernel<Half>&, int64_t, int64_t);   \
  void run(const Kernel<BFloat16>&, int64_t, int64_t)

namespace dtf {

DTF_DECLARE_KERNEL(EntropyKLForward);
DTF_DECLARE_KERNEL(EntropyKLBackward);
DTF_DECLARE_KERNEL(LogitGradKL);
DTF_DECLARE_KERNEL(LogitGradCE);
DTF_DECLARE_KERNEL(CELoss);
DTF_DECLARE_KERNEL(TradesLoss);
DTF_DECLARE_KERNEL(MartLoss);
DTF_DECLARE_KERNEL(PGDStepLinf);
DTF_DECLARE_KERNEL(PGDStepL2);
DTF_DECLARE_KERNEL(SampleStats);
DTF_DECLARE_KERNEL(LambdaX);
DTF_DECLARE_KERNEL(RandomStart);

}  // namespace dtf
