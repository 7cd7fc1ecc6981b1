// d(objective)/d(logits) for the attack: softmax(z') - p and softmax(z) - onehot(y).
#pragma once

#include "tensor.h"

namespace dtf {

template <typename Device>
Tensor logit_grad_kl(Tensor adv, Tensor clean_log_probs) {
  check_logits("adv", adv);
  check_same("clean_log_probs", clean_log_probs, adv);
  adv = as_contiguous(adv), clean_log_probs = as_contiguous(clean_log_probs);
  Tensor grad = new_like(adv);
  visit_dtype("adv", adv, [&]<typename T>() {
    Device::launch(adv, LogitGradKL<T>{in<T>(adv), in<T>(clean_log_probs), out<T>(grad), adv.size(1)}, adv.size(0),
                   adv.size(1), Split::at_vectors);
  });
  return grad;
}

template <typename Device>
Tensor logit_grad_ce(Tensor logits, Tensor labels) {
  check_logits("logits", logits);
  check_rows("labels", labels, logits, ScalarType::Long);
  logits = as_contiguous(logits), labels = as_contiguous(labels);
  Tensor grad = new_like(logits);
  visit_dtype("logits", logits, [&]<typename T>() {
    Device::launch(logits, LogitGradCE<T>{in<T>(logits), in<int64_t>(labels), out<T>(grad), logits.size(1)},
                   logits.size(0), logits.size(1), Split::at_vectors);
  });
  return grad;
}

}  // namespace dtf
