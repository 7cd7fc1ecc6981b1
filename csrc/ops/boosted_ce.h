// MART's boosted cross-entropy of each row and its gradient, in one pass.
#pragma once

#include "tensor.h"

namespace dtf {

template <typename Device>
std::tuple<Tensor, Tensor> boosted_ce(Tensor logits, Tensor labels, double slack) {
  check_logits("logits", logits);
  check_rows("labels", labels, logits, ScalarType::Long);
  logits = as_contiguous(logits), labels = as_contiguous(labels);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor loss = new_rows(logits, {rows}), grad = new_like(logits);
  visit_dtype("logits", logits, [&]<typename T>() {
    Device::launch(
        logits, BoostedCE<T>{in<T>(logits), in<int64_t>(labels), out<Compute<T>>(loss), out<T>(grad), classes, slack},
        rows, classes, Split::at_vectors);
  });
  return {loss, grad};
}

}  // namespace dtf
