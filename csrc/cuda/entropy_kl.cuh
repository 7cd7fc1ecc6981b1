// Entropy and KL divergence of rows of logits, and their gradients.
//
// Fused: two log-softmaxes, the entropy, the divergence. Both rows are read once (above 1024 classes twice) and no
// probability is ever written; the backward rebuilds them from two numbers per row.
#pragma once

#include "rows.cuh"

namespace dtf {

template <typename T, typename Shape>
DTF_KERNEL(Shape::threads)
entropy_kl_forward(EntropyKLForward<T> k, int64_t rows) {
  using A = Compute<T>;
  const int classes = static_cast<int>(k.classes);
  for_rows<Shape>(rows, [&](int64_t row, bool valid) {
    const Row<T, Shape> clean(k.clean, row, classes, valid), adv(k.adv, row, classes, valid);
    const A clean_max = over_classes<Shape>(classes, A(-INFINITY), clean, Max{});
    const A adv_max = over_classes<Shape>(classes, A(-INFINITY), adv, Max{});
    EntropyKLSums<A> lane;
    for_classes<Shape>(classes, [&](int c, int item) { lane.add(clean(c, item) - clean_max, adv(c, item) - adv_max); });
    A sum[4] = {lane.exp_clean, lane.exp_adv, lane.clean_shift, lane.difference};
    reduce<Shape::lanes>(sum, Add{});
    const EntropyKLSums<A> sums{sum[0], sum[1], sum[2], sum[3]};
    if (valid && row_lane<Shape>() == 0) {
      k.entropy[row] = sums.entropy();
      k.kl[row] = sums.kl();
      A* n = k.normalisers + 4 * row;
      n[0] = clean_max, n[1] = log(sums.exp_clean), n[2] = adv_max, n[3] = log(sums.exp_adv);
    }
  });
}

template <typename T, typename Shape>
DTF_KERNEL(Shape::threads)
entropy_kl_backward(EntropyKLBackward<T> k, int64_t rows) {
  using A = Compute<T>;
  const int classes = static_cast<int>(k.classes);
  const bool has_entropy = k.grad_entropy != nullptr, has_kl = k.grad_kl != nullptr;
  for_rows<Shape>(rows, [&](int64_t row, bool valid) {
    if (!valid) return;  // nothing here needs the other threads
    const A* n = k.normalisers + 4 * row;
    const EntropyKLGradTerms<A> terms{has_entropy ? k.grad_entropy[row] : A(0),
                                      has_kl ? k.grad_kl[row] : A(0),
                                      k.entropy[row],
                                      k.kl[row],
                                      {n[0], n[1]},
                                      {n[2], n[3]},
                                      has_entropy,
                                      has_kl};
    const int64_t start = row * classes;
    for (int c = row_lane<Shape>(); c < classes; c += Shape::lanes) {
      const EntropyKLGrad<A> g = terms(widen(k.clean[start + c]), widen(k.adv[start + c]));
      narrow(g.clean, k.grad_clean[start + c]);
      narrow(g.adv, k.grad_adv[start + c]);
    }
  });
}

template <typename T>
void enqueue(const EntropyKLForward<T>& k, int64_t rows, const Queue& queue) {
  with_row_shape(k.classes,
                 [&](auto shape) { start_rows(shape, &entropy_kl_forward<T, decltype(shape)>, k, rows, queue); });
}
template <typename T>
void enqueue(const EntropyKLBackward<T>& k, int64_t rows, const Queue& queue) {
  with_row_lanes(k.classes,
                 [&](auto shape) { start_rows(shape, &entropy_kl_backward<T, decltype(shape)>, k, rows, queue); });
}

}  // namespace dtf
