// The training losses and their gradients, one launch each: the rows stay in registers from the search for the largest
// logits to the gradients (above 1024 classes they are read again in each pass).
#pragma once

#include "rows.cuh"

namespace dtf {

template <typename Shape, typename T>
DTF_DEVICE Peaks<Compute<T>> find_peaks(const Row<T, Shape>& logits, int classes, int64_t label) {
  using A = Compute<T>;
  A x[2] = {A(-INFINITY), A(-INFINITY)};
  for_classes<Shape>(classes, [&](int c, int item) {
    const A z = logits(c, item);
    x[0] = max(x[0], select(c == label, z, A(-INFINITY)));
    x[1] = max(x[1], select(c == label, A(-INFINITY), z));
  });
  reduce<Shape::lanes>(x, Max{});
  return {nan_unless_class(label, classes, x[0]), x[1]};
}

template <typename T, typename Shape>
DTF_ROW_KERNEL(T, Shape)
ce_loss(CELoss<T> k, int64_t rows) {
  using A = Compute<T>;
  const int classes = static_cast<int>(k.classes);
  for_rows<Shape>(rows, [&](int64_t row, bool valid) {
    const Row<T, Shape> logits(k.logits, row, classes, valid);
    const int64_t label = row_label(k.labels, row, valid);
    const Peaks<A> peaks = find_peaks(logits, classes, label);
    const A maximum = peaks.maximum();
    auto exps = [&](int c, int item) { return exp(logits(c, item) - maximum); };
    const A total = over_classes<Shape>(classes, A(0), exps, Add{}), inverse_sum = A(1) / total;
    if (valid && row_lane<Shape>() == 0) {
      const LabelledRow<A> terms{peaks, total};
      k.loss[row] = terms.ce();
      k.margin[row] = terms.margin();
    }
    write_row<Shape>(k.grad, row, classes, valid, [&](int c, int item) {
      return logit_grad_ce(exps(c, item), inverse_sum, select(c == label, A(1), A(0)));
    });
  });
}

// Writes both gradients that grad(clean logit, adversarial logit, class) gives for one class.
template <typename Shape, typename T, typename F>
DTF_DEVICE void write_rows(T* clean_matrix, T* adv_matrix, int64_t row, int classes, bool valid,
                           const Row<T, Shape>& clean, const Row<T, Shape>& adv, F grad) {
  T *clean_target = clean_matrix + row * classes, *adv_target = adv_matrix + row * classes;
  for_classes<Shape>(classes, [&](int c, int item) {
    if (valid && c < classes) {
      const EntropyKLGrad<Compute<T>> g = grad(clean(c, item), adv(c, item), c);
      narrow(g.clean, clean_target[c]);
      narrow(g.adv, adv_target[c]);
    }
  });
}

template <typename T, typename Shape>
DTF_ROW_KERNEL(T, Shape)
trades_loss(TradesLoss<T> k, int64_t rows) {
  using A = Compute<T>;
  const int classes = static_cast<int>(k.classes);
  const Weighting<A> weighting{A(k.base), A(k.alpha), A(k.beta), A(k.minimum), A(k.maximum)};
  const bool has_sensitivity = k.sensitivity != nullptr;
  for_rows<Shape>(rows, [&](int64_t row, bool valid) {
    const Row<T, Shape> clean(k.clean, row, classes, valid), adv(k.adv, row, classes, valid);
    const int64_t label = row_label(k.labels, row, valid);
    const A sensitivity = has_sensitivity && valid ? k.sensitivity[row] : A(0);
    const Peaks<A> clean_peaks = find_peaks(clean, classes, label), adv_peaks = find_peaks(adv, classes, label);
    const A clean_max = clean_peaks.maximum(), adv_max = adv_peaks.maximum();
    EntropyKLSums<A> lane;
    for_classes<Shape>(classes, [&](int c, int item) { lane.add(clean(c, item) - clean_max, adv(c, item) - adv_max); });
    A sum[4] = {lane.exp_clean, lane.exp_adv, lane.clean_shift, lane.difference};
    reduce<Shape::lanes>(sum, Add{});
    const TradesRow<A> terms{
        {sum[0], sum[1], sum[2], sum[3]}, clean_peaks, adv_peaks, sensitivity, weighting, k.entropy_gradient};
    if (valid && row_lane<Shape>() == 0) {
      k.loss[row] = terms.loss();
      k.ce[row] = terms.clean.ce();
      k.kl[row] = terms.kl;
      k.entropy[row] = terms.entropy;
      k.weight[row] = terms.weight;
      k.margin[row] = terms.adv.margin();
      k.grad_sensitivity[row] = terms.grad_sensitivity();
    }
    write_rows(k.grad_clean, k.grad_adv, row, classes, valid, clean, adv,
               [&](A z, A z_adv, int c) { return terms.grad(z, z_adv, select(c == label, A(1), A(0))); });
  });
}

struct Min {
  template <typename V>
  DTF_DEVICE V operator()(V a, V b) const {
    return min(a, b);
  }
};

template <typename T, typename Shape>
DTF_ROW_KERNEL(T, Shape)
mart_loss(MartLoss<T> k, int64_t rows) {
  using A = Compute<T>;
  const int classes = static_cast<int>(k.classes);
  const A nothing = A(-INFINITY);
  for_rows<Shape>(rows, [&](int64_t row, bool valid) {
    const Row<T, Shape> clean(k.clean, row, classes, valid), adv(k.adv, row, classes, valid);
    const int64_t label = row_label(k.labels, row, valid);
    const Peaks<A> clean_peaks = find_peaks(clean, classes, label), adv_peaks = find_peaks(adv, classes, label);
    // The first of the rivals; with a single class, and NaN beside the label, it is none.
    auto rivals = [&](int c, int item) {
      const bool is_rival = adv(c, item) == adv_peaks.rival;
      return select(is_rival & (c != label), c, INT32_MAX);
    };
    const int boosted = over_classes<Shape>(classes, INT32_MAX, rivals, Min{});
    auto rest = [&](int c, int item) { return select(c == boosted, nothing, adv(c, item)); };
    const A top = finite_top(over_classes<Shape>(classes, nothing, rest, Max{}));
    const A clean_max = clean_peaks.maximum(), adv_max = adv_peaks.maximum();
    MartSums<A> lane;
    for_classes<Shape>(classes, [&](int c, int item) {
      lane.add(clean(c, item) - clean_max, adv(c, item) - adv_max, adv(c, item) - top, A(c == label), A(c == boosted));
    });
    A sum[3] = {lane.exp_wrong, lane.difference, lane.exp_rest};
    reduce<Shape::lanes>(sum, Add{});
    const MartRow<A> terms{{sum[0], sum[1], sum[2]}, clean_peaks, adv_peaks, top, A(k.beta), A(k.slack),
                           A(k.weight_slack)};
    if (valid && row_lane<Shape>() == 0) {
      k.loss[row] = terms.loss();
      k.bce[row] = terms.adv.bce();
      k.kl[row] = terms.kl;
      k.weight[row] = terms.weight;
      k.margin[row] = terms.adv.row.margin();
    }
    write_rows(k.grad_clean, k.grad_adv, row, classes, valid, clean, adv,
               [&](A z, A z_adv, int c) { return terms.grad(z, z_adv, A(c == label), A(c == boosted)); });
  });
}

template <typename T>
void enqueue(const CELoss<T>& k, int64_t rows, const Queue& queue) {
  with_row_shape(k.classes, [&](auto shape) { start_rows(shape, &ce_loss<T, decltype(shape)>, k, rows, queue); });
}
template <typename T>
void enqueue(const TradesLoss<T>& k, int64_t rows, const Queue& queue) {
  with_row_shape(k.classes, [&](auto shape) { start_rows(shape, &trades_loss<T, decltype(shape)>, k, rows, queue); });
}
template <typename T>
void enqueue(const MartLoss<T>& k, int64_t rows, const Queue& queue) {
  with_row_shape(k.classes, [&](auto shape) { start_rows(shape, &mart_loss<T, decltype(shape)>, k, rows, queue); });
}

}  // namespace dtf
