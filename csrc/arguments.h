// What the kernels of each operator are given, on every device: pointers, sizes, settings.
//
// T is the storage type of the tensors. N samples, C classes; a sample is a contiguous run of `size` elements, whatever
// the order of its dimensions in memory. What a kernel runs over (rows, samples or elements) and their number are given
// beside the struct.
#pragma once

#include "types.h"

namespace dtf {

// ---- rows of logits ---------------------------------------------------------------------------------------------

template <typename T>
struct EntropyKLForward {
  const T *clean, *adv;     // [N, C]
  Compute<T>*entropy, *kl;  // [N]
  Compute<T>* normalisers;  // [N, 4]: maximum and log-sum of the clean row, of the adversarial row
  int64_t classes;
};

template <typename T>
struct EntropyKLBackward {
  const Compute<T>*grad_entropy, *grad_kl;  // [N], either may be null: no gradient comes from there
  const T *clean, *adv;                     // [N, C]
  const Compute<T>*entropy, *kl;            // [N]
  const Compute<T>* normalisers;            // [N, 4]
  T *grad_clean, *grad_adv;                 // [N, C]
  int64_t classes;
};

template <typename T>
struct LogitGradKL {
  const T *adv, *clean_log_probs;  // [N, C]
  T* grad;                         // [N, C]
  int64_t classes;
};

template <typename T>
struct LogitGradCE {
  const T* logits;        // [N, C]
  const int64_t* labels;  // [N]; a row whose label is out of range becomes NaN
  T* grad;                // [N, C]
  int64_t classes;
};

template <typename T>
struct CELoss {
  const T* logits;           // [N, C]
  const int64_t* labels;     // [N]; a row whose label is out of range becomes NaN
  Compute<T>*loss, *margin;  // [N]
  T* grad;                   // [N, C]
  int64_t classes;
};

template <typename T>
struct TradesLoss {
  const T *clean, *adv;                                   // [N, C]
  const Compute<T>* sensitivity;                          // [N], null for zeros
  const int64_t* labels;                                  // [N]; a row whose label is out of range becomes NaN
  Compute<T>*loss, *ce, *kl, *entropy, *weight, *margin;  // [N]
  T *grad_clean, *grad_adv;                               // [N, C]
  Compute<T>* grad_sensitivity;                           // [N]
  int64_t classes;
  double base, alpha, beta, minimum, maximum;
  bool entropy_gradient;
};

template <typename T>
struct MartLoss {
  const T *clean, *adv;                          // [N, C]
  const int64_t* labels;                         // [N]; a row whose label is out of range becomes NaN
  Compute<T>*loss, *bce, *kl, *weight, *margin;  // [N]
  T *grad_clean, *grad_adv;                      // [N, C]
  int64_t classes;
  double beta, slack, weight_slack;  // slack is added to 1 - p'_k under the logarithm, weight_slack to 1 - p_y
};

// ---- pixels -----------------------------------------------------------------------------------------------------

template <typename T>
struct PGDStep {
  T* adv;  // changed in place
  const T *grad, *clean;
  int64_t size;
  double step_size, epsilon, lower, upper;
};
template <typename T>
struct PGDStepLinf : PGDStep<T> {};  // over elements
template <typename T>
struct PGDStepL2 : PGDStep<T> {};  // over samples

template <typename T>
struct SampleStats {
  const T *grad, *adv, *clean;
  Compute<T>*l2, *l1, *linf, *fosc;  // [N]
  int64_t size;
  double epsilon, lower, upper;
};

template <typename T>
struct LambdaX {
  const T* logits;                           // [N, C]
  const T* grad;                             // [N, size]
  Compute<T>*value, *entropy, *sensitivity;  // [N]
  int64_t classes, size;
  double alpha, beta, base, minimum, maximum;
};

enum class StartKind : int32_t { linf, l2, gaussian };
template <typename T>
struct RandomStart {
  const T* clean;        // [N, size]
  const int64_t* index;  // [N]
  T* start;              // [N, size]
  int64_t size;
  StartKind kind;
  double radius, lower, upper;
  uint64_t key;
};

}  // namespace dtf
