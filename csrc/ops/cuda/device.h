// How the operators run on a GPU: kernels of cuda/ on the current stream of the tensors' device.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "../../cuda/kernels.h"
#include "../tensor.h"

namespace dtf {

struct CUDA {
  // Queues a kernel over `count` rows, samples or elements; nothing waits for it.
  template <template <typename> class Kernel, typename T>
  static void launch(const Tensor& on, const Kernel<T>& kernel, int64_t count, int64_t, Split = Split::anywhere) {
    const int device = on.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Queue queue{torch::stable::accelerator::getCurrentStream(device).nativeHandle()};
    const auto error = static_cast<cudaError_t>(dtf::launch(kernel, count, queue));
    STD_TORCH_CHECK(error == cudaSuccess, "a CUDA kernel could not be launched: ", cudaGetErrorString(error));
  }
};

}  // namespace dtf
