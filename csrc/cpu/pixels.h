// Per-pixel and per-sample kernels: PGD step, sample statistics, lambda(x), random starts.
// A sample is a contiguous run of `size` elements, whatever the order of its dimensions in memory.
#pragma once

#include "simd.h"

namespace dtf {

template <typename T>
struct PGDStep {
  T* adv;  // changed in place
  const T *grad, *clean;
  int64_t size;  // elements per sample
  double step_size, epsilon, lower, upper;
};
// Over elements.
template <typename T>
struct PGDStepLinf : PGDStep<T> {};
DTF_DECLARE_KERNEL(PGDStepLinf);
// Over samples.
template <typename T>
struct PGDStepL2 : PGDStep<T> {};
DTF_DECLARE_KERNEL(PGDStepL2);

// Over samples.
template <typename T>
struct SampleStats {
  const T *grad, *adv, *clean;
  Compute<T>*l2, *l1, *linf, *fosc;  // [N]
  int64_t size;
  double epsilon, lower, upper;
};
DTF_DECLARE_KERNEL(SampleStats);

// Over samples.
template <typename T>
struct LambdaX {
  const T* logits;                           // [N, C]
  const T* grad;                             // [N, size]
  Compute<T>*value, *entropy, *sensitivity;  // [N]
  int64_t classes, size;
  double alpha, beta, base, minimum, maximum;
};
DTF_DECLARE_KERNEL(LambdaX);

// Over samples.
template <typename T>
struct RandomStart {
  enum class Kind { linf, l2, gaussian };
  const T* clean;        // [N, size]
  const int64_t* index;  // [N]
  T* start;              // [N, size]
  int64_t size;
  Kind kind;
  double radius, lower, upper;
  uint64_t key;
};
DTF_DECLARE_KERNEL(RandomStart);

}  // namespace dtf
