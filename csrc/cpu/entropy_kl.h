// Entropy of the clean rows and their KL divergence to the adversarial rows, forward and backward.
#pragma once

#include "simd.h"

namespace dtf {

template <typename T>
struct EntropyKLForward {
  const T *clean, *adv;     // [N, C]
  Compute<T>*entropy, *kl;  // [N]
  Compute<T>* normalisers;  // [N, 4]: maximum and log-sum of the clean row, of the adversarial row
  int64_t classes;
};
DTF_DECLARE_KERNEL(EntropyKLForward);

template <typename T>
struct EntropyKLBackward {
  const Compute<T>*grad_entropy, *grad_kl;  // [N], either may be null: no gradient comes from there
  const T *clean, *adv;                     // [N, C]
  const Compute<T>*entropy, *kl;            // [N]
  const Compute<T>* normalisers;            // [N, 4]
  T *grad_clean, *grad_adv;                 // [N, C]
  int64_t classes;
};
DTF_DECLARE_KERNEL(EntropyKLBackward);

}  // namespace dtf
