// The gradient of the attack's objective with respect to the logits, one launch: softmax and what is subtracted from
// it. The row is read once (above 1024 classes three times); only the gradient is written.
#pragma once

#include "rows.cuh"

namespace dtf {

// Softmax of one row, shared by its lanes: exps(c, item) * inverse_sum.
template <typename T, typename Shape>
struct Softmax {
  using A = Compute<T>;
  Row<T, Shape> row;
  A maximum, inverse_sum;

  DTF_DEVICE Softmax(const T* logits, int64_t i, int classes, bool valid) : row(logits, i, classes, valid) {
    maximum = over_classes<Shape>(classes, A(-INFINITY), row, Max{});
    if constexpr (Shape::items > 0) row.map([&](A z) { return exp(z - maximum); });
    inverse_sum = A(1) / over_classes<Shape>(classes, A(0), *this, Add{});
  }
  // exp(z - maximum)
  DTF_DEVICE A operator()(int c, int item) const {
    if constexpr (Shape::items > 0) return row(c, item);
    return exp(row(c, item) - maximum);
  }
};

template <typename T, typename Shape>
DTF_KERNEL(Shape::threads)
logit_grad_kl(LogitGradKL<T> k, int64_t rows) {
  const int classes = static_cast<int>(k.classes);
  for_rows<Shape>(rows, [&](int64_t row, bool valid) {
    const Softmax<T, Shape> adv(k.adv, row, classes, valid);
    const T* log_probs = k.clean_log_probs + row * classes;
    write_row<Shape>(k.grad, row, classes, valid, [&](int c, int item) {
      return dtf::logit_grad_kl(adv(c, item), adv.inverse_sum, widen(log_probs[c]));
    });
  });
}

template <typename T, typename Shape>
DTF_KERNEL(Shape::threads)
logit_grad_ce(LogitGradCE<T> k, int64_t rows) {
  using A = Compute<T>;
  const int classes = static_cast<int>(k.classes);
  for_rows<Shape>(rows, [&](int64_t row, bool valid) {
    const Softmax<T, Shape> softmax(k.logits, row, classes, valid);
    const int64_t label = row_label(k.labels, row, valid);
    const A inverse_sum = nan_unless_class(label, classes, softmax.inverse_sum);
    write_row<Shape>(k.grad, row, classes, valid, [&](int c, int item) {
      return dtf::logit_grad_ce(softmax(c, item), inverse_sum, select(c == label, A(1), A(0)));
    });
  });
}

template <typename T>
void enqueue(const LogitGradKL<T>& k, int64_t rows, const Queue& queue) {
  with_row_shape(k.classes, [&](auto shape) { start_rows(shape, &logit_grad_kl<T, decltype(shape)>, k, rows, queue); });
}
template <typename T>
void enqueue(const LogitGradCE<T>& k, int64_t rows, const Queue& queue) {
  with_row_shape(k.classes, [&](auto shape) { start_rows(shape, &logit_grad_ce<T, decltype(shape)>, k, rows, queue); });
}

}  // namespace dtf
