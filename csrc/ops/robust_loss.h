// The training losses of each row and their gradients, in one pass.
#pragma once

#include "tensor.h"

namespace dtf {

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> ce_loss(Tensor logits, Tensor labels) {
  check_logits("logits", logits);
  check_rows("labels", labels, logits, ScalarType::Long);
  logits = as_contiguous(logits), labels = as_contiguous(labels);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor loss = new_rows(logits, {rows}), margin = new_rows(logits, {rows}), grad = new_like(logits);
  visit_dtype("logits", logits, [&]<typename T>() {
    using A = Compute<T>;
    Device::launch(logits,
                   CELoss<T>{in<T>(logits), in<int64_t>(labels), out<A>(loss), out<A>(margin), out<T>(grad), classes},
                   rows, classes, Split::at_vectors);
  });
  return {loss, margin, grad};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> trades_loss(
    Tensor clean, Tensor adv, std::optional<Tensor> sensitivity, Tensor labels, double base, double alpha, double beta,
    double minimum, double maximum, bool entropy_gradient) {
  check_logits("clean", clean);
  check_same("adv", adv, clean);
  check_rows("labels", labels, clean, ScalarType::Long);
  if (sensitivity) {
    check_rows("sensitivity", *sensitivity, clean, row_dtype(clean));
    sensitivity = as_contiguous(*sensitivity);
  }
  clean = as_contiguous(clean), adv = as_contiguous(adv), labels = as_contiguous(labels);
  const int64_t rows = clean.size(0), classes = clean.size(1);
  auto figure = [&] { return new_rows(clean, {rows}); };
  Tensor loss = figure(), ce = figure(), kl = figure(), entropy = figure(), weight = figure(), margin = figure(),
         grad_clean = new_like(clean), grad_adv = new_like(adv), grad_sensitivity = figure();
  visit_dtype("clean", clean, [&]<typename T>() {
    using A = Compute<T>;
    Device::launch(clean,
                   TradesLoss<T>{in<T>(clean),
                                 in<T>(adv),
                                 sensitivity ? in<A>(*sensitivity) : nullptr,
                                 in<int64_t>(labels),
                                 out<A>(loss),
                                 out<A>(ce),
                                 out<A>(kl),
                                 out<A>(entropy),
                                 out<A>(weight),
                                 out<A>(margin),
                                 out<T>(grad_clean),
                                 out<T>(grad_adv),
                                 out<A>(grad_sensitivity),
                                 classes,
                                 base,
                                 alpha,
                                 beta,
                                 minimum,
                                 maximum,
                                 entropy_gradient && alpha != 0},
                   rows, 2 * classes, Split::at_vectors);
  });
  return {loss, ce, kl, entropy, weight, margin, grad_clean, grad_adv, grad_sensitivity};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mart_loss(Tensor clean, Tensor adv, Tensor labels,
                                                                             double beta, double slack,
                                                                             double weight_slack) {
  check_logits("clean", clean);
  check_same("adv", adv, clean);
  check_rows("labels", labels, clean, ScalarType::Long);
  clean = as_contiguous(clean), adv = as_contiguous(adv), labels = as_contiguous(labels);
  const int64_t rows = clean.size(0), classes = clean.size(1);
  auto figure = [&] { return new_rows(clean, {rows}); };
  Tensor loss = figure(), bce = figure(), kl = figure(), weight = figure(), margin = figure(),
         grad_clean = new_like(clean), grad_adv = new_like(adv);
  visit_dtype("clean", clean, [&]<typename T>() {
    using A = Compute<T>;
    Device::launch(clean,
                   MartLoss<T>{in<T>(clean), in<T>(adv), in<int64_t>(labels), out<A>(loss), out<A>(bce), out<A>(kl),
                               out<A>(weight), out<A>(margin), out<T>(grad_clean), out<T>(grad_adv), classes, beta,
                               slack, weight_slack},
                   rows, 2 * classes, Split::at_vectors);
  });
  return {loss, bce, kl, weight, margin, grad_clean, grad_adv};
}

}  // namespace dtf
