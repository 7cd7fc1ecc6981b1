// MART's boosted cross-entropy and its gradient in one launch: the row stays in registers from the search for the most
// probable wrong class to the gradient (above 1024 classes it is read again in each pass).
#pragma once

#include "rows.cuh"

namespace dtf {

// A class and its logit.
template <typename A>
struct Candidate {
  A logit;
  int index;
};
template <typename A>
DTF_DEVICE Candidate<A> shuffle_xor(Candidate<A> x, int mask) {
  return {shuffle_xor(x.logit, mask), shuffle_xor(x.index, mask)};
}
// The larger logit, the first of equals.
struct MoreProbable {
  template <typename A>
  DTF_DEVICE Candidate<A> operator()(Candidate<A> a, Candidate<A> b) const {
    const bool second = b.logit > a.logit || (b.logit == a.logit && b.index < a.index);
    return {select(second, b.logit, a.logit), select(second, b.index, a.index)};
  }
};

template <typename T, typename Shape>
DTF_KERNEL(Shape::threads)
boosted_ce(BoostedCE<T> k, int64_t rows) {
  using A = Compute<T>;
  const int classes = static_cast<int>(k.classes);
  const A nothing = A(-INFINITY);
  for_rows<Shape>(rows, [&](int64_t row, bool valid) {
    const Row<T, Shape> logits(k.logits, row, classes, valid);
    const int64_t label = row_label(k.labels, row, valid);
    const A label_logit = over_classes<Shape>(
        classes, nothing, [&](int c, int item) { return select(c == label, logits(c, item), nothing); }, Max{});
    // With a single class the index is none's.
    const Candidate<A> none{nothing, INT32_MAX};
    const Candidate<A> wrong = over_classes<Shape>(
        classes, none,
        [&](int c, int item) {
          return Candidate<A>{select(c == label, nothing, logits(c, item)), select(c == label, INT32_MAX, c)};
        },
        MoreProbable{});
    const A maximum = max(label_logit, wrong.logit);
    const A rest_maximum = over_classes<Shape>(
        classes, nothing, [&](int c, int item) { return select(c == wrong.index, nothing, logits(c, item)); }, Max{});
    A sum[2] = {A(0), A(0)};
    for_classes<Shape>(classes, [&](int c, int item) {
      sum[0] = sum[0] + exp(logits(c, item) - maximum);
      sum[1] = sum[1] + select(c == wrong.index, A(0), exp(logits(c, item) - rest_maximum));
    });
    reduce<Shape::lanes>(sum, Add{});
    const Normaliser<A> all{maximum, nan_unless_class(label, classes, log(sum[0]))}, rest{rest_maximum, log(sum[1])};
    const BoostedCERow<A> terms{all, rest, A(k.slack)};
    const A wrong_prob = exp(all.log_prob(wrong.logit));
    write_row<Shape>(k.grad, row, classes, valid, [&](int c, int item) {
      return terms.grad(logits(c, item), wrong_prob, A(c == label), A(c == wrong.index));
    });
    if (valid && row_lane<Shape>() == 0) k.loss[row] = terms.loss(label_logit);
  });
}

template <typename T>
void enqueue(const BoostedCE<T>& k, int64_t rows, const Queue& queue) {
  with_row_shape(k.classes, [&](auto shape) { start_rows(shape, &boosted_ce<T, decltype(shape)>, k, rows, queue); });
}

}  // namespace dtf
