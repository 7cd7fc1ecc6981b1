// d(objective)/d(logits) for the attack: softmax(z') - p and softmax(z) - onehot(y).
#pragma once

#include "simd.h"

namespace dtf {

template <typename T>
struct LogitGradKL {
  const T *adv, *clean_log_probs;  // [N, C]
  T* grad;                         // [N, C]
  int64_t classes;
};
DTF_DECLARE_KERNEL(LogitGradKL);

template <typename T>
struct LogitGradCE {
  const T* logits;        // [N, C]
  const int64_t* labels;  // [N]; a row whose label is out of range becomes NaN
  T* grad;                // [N, C]
  int64_t classes;
};
DTF_DECLARE_KERNEL(LogitGradCE);

}  // namespace dtf
