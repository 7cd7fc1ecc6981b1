// Every CUDA kernel as a plain function: launch(arguments, count, queue) queues it over `count` rows, samples or
// elements and returns the CUDA error code, 0 for success.
#pragma once

#include "../arguments.h"

namespace dtf {

// Where kernels are queued.
struct Queue {
  void* stream = nullptr;      // a cudaStream_t of the current device
  int64_t max_blocks = 65535;  // of a grid, in each dimension; the kernels stride over what does not fit
};

#define DTF_DECLARE_CUDA_KERNEL(Kernel)                     \
  int launch(const Kernel<float>&, int64_t, const Queue&);  \
  int launch(const Kernel<double>&, int64_t, const Queue&); \
  int launch(const Kernel<Half>&, int64_t, const Queue&);   \
  int launch(const Kernel<BFloat16>&, int64_t, const Queue&)

DTF_DECLARE_CUDA_KERNEL(EntropyKLForward);
DTF_DECLARE_CUDA_KERNEL(EntropyKLBackward);
DTF_DECLARE_CUDA_KERNEL(LogitGradKL);
DTF_DECLARE_CUDA_KERNEL(LogitGradCE);
DTF_DECLARE_CUDA_KERNEL(CELoss);
DTF_DECLARE_CUDA_KERNEL(TradesLoss);
DTF_DECLARE_CUDA_KERNEL(MartLoss);
DTF_DECLARE_CUDA_KERNEL(PGDStepLinf);
DTF_DECLARE_CUDA_KERNEL(PGDStepL2);
DTF_DECLARE_CUDA_KERNEL(SampleStats);
DTF_DECLARE_CUDA_KERNEL(LambdaX);
DTF_DECLARE_CUDA_KERNEL(RandomStart);

}  // namespace dtf
