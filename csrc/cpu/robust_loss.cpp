#include <algorithm>
#include <memory>

#include "kernels.h"
#include "rows.h"

namespace dtf {
namespace {

// ---- results of each row: `count` rows from `first` on, a lane for each --------------------------------------------

template <typename L, typename T>
DTF_INLINE void store_results(const CELoss<T>& k, int64_t first, int64_t count, const LabelledRow<L>& row) {
  store_part(k.loss + first, row.ce(), count);
  store_part(k.margin + first, row.margin(), count);
}
template <typename L, typename T>
DTF_INLINE void store_results(const TradesLoss<T>& k, int64_t first, int64_t count, const TradesRow<L>& row) {
  store_part(k.loss + first, row.loss(), count);
  store_part(k.ce + first, row.clean.ce(), count);
  store_part(k.kl + first, row.kl, count);
  store_part(k.entropy + first, row.entropy, count);
  store_part(k.weight + first, row.weight, count);
  store_part(k.margin + first, row.adv.margin(), count);
  store_part(k.grad_sensitivity + first, row.grad_sensitivity(), count);
}
template <typename L, typename T>
DTF_INLINE void store_results(const MartLoss<T>& k, int64_t first, int64_t count, const MartRow<L>& row) {
  store_part(k.loss + first, row.loss(), count);
  store_part(k.bce + first, row.adv.bce(), count);
  store_part(k.kl + first, row.kl, count);
  store_part(k.weight + first, row.weight, count);
  store_part(k.margin + first, row.adv.row.margin(), count);
}

template <typename L, typename T>
DTF_INLINE TradesRow<L> trades_row(const TradesLoss<T>& k, const EntropyKLSums<L>& sums, const Peaks<L>& clean,
                                   const Peaks<L>& adv, L sensitivity) {
  return {sums,
          clean,
          adv,
          sensitivity,
          {L::all(k.base), L::all(k.alpha), L::all(k.beta), L::all(k.minimum), L::all(k.maximum)},
          k.entropy_gradient};
}

// ---- few classes: a lane is a row ----------------------------------------------------------------------------------

// Beside the peaks: the class of the rival (-1: none), and the largest logit of the classes that remain.
template <typename L>
struct Ranking {
  Peaks<L> peaks;
  L rival, third;
};
template <typename T, typename L>
DTF_INLINE Ranking<L> rank(const RowBlock<T, L>& logits, const BlockLabels<L>& labels, int64_t classes) {
  const L nothing(-std::numeric_limits<typename L::Scalar>::infinity());
  Ranking<L> r{{labels.missing, nothing}, L(-1), nothing};
  for_classes<L>(classes, [&](int64_t c, L number) DTF_LAMBDA_INLINE {
    auto is_label = labels.index == number;
    r.peaks.label = select(is_label, logits[c], r.peaks.label);
    L z = select(is_label, nothing, logits[c]);
    r.third = max(r.third, min(r.peaks.rival, z));
    r.rival = select(z > r.peaks.rival, number, r.rival);
    r.peaks.rival = max(r.peaks.rival, z);
  });
  return r;
}

template <typename L, typename T>
DTF_INLINE void block_of_rows(const CELoss<T>& k, int64_t first, int64_t count) {
  RowBlock<T, L> logits;
  logits.read(k.logits + first * k.classes, count, k.classes);
  const BlockLabels<L> labels(k.labels + first, count, k.classes);
  const Peaks<L> peaks = rank(logits, labels, k.classes).peaks;
  const L maximum = peaks.maximum();
  L total(0);
  for (int64_t c = 0; c < k.classes; ++c) {
    L e = exp(logits[c] - maximum);
    logits.set(c, e);
    total = total + e;
  }
  store_results(k, first, count, LabelledRow<L>{peaks, total});
  const L inverse_sum = L(1) / total;
  for_classes<L>(k.classes, [&](int64_t c, L number) DTF_LAMBDA_INLINE {
    logits.set(c, logit_grad_ce(logits[c], inverse_sum, labels.is(number)));
  });
  logits.write(k.grad + first * k.classes, count, k.classes);
}

template <typename L, typename T>
DTF_INLINE void block_of_rows(const TradesLoss<T>& k, int64_t first, int64_t count) {
  RowBlock<T, L> clean, adv;
  clean.read(k.clean + first * k.classes, count, k.classes);
  adv.read(k.adv + first * k.classes, count, k.classes);
  const BlockLabels<L> labels(k.labels + first, count, k.classes);
  const Peaks<L> clean_peaks = rank(clean, labels, k.classes).peaks, adv_peaks = rank(adv, labels, k.classes).peaks;
  const L clean_max = clean_peaks.maximum(), adv_max = adv_peaks.maximum();
  EntropyKLSums<L> sums;
  for (int64_t c = 0; c < k.classes; ++c) sums.add(clean[c] - clean_max, adv[c] - adv_max);
  const L sensitivity = k.sensitivity ? load_part<L>(k.sensitivity + first, count, Compute<T>(0)) : L(0);
  const TradesRow<L> row = trades_row(k, sums, clean_peaks, adv_peaks, sensitivity);
  store_results(k, first, count, row);
  for_classes<L>(k.classes, [&](int64_t c, L number) DTF_LAMBDA_INLINE {
    EntropyKLGrad<L> g = row.grad(clean[c], adv[c], labels.is(number));
    clean.set(c, g.clean);
    adv.set(c, g.adv);
  });
  clean.write(k.grad_clean + first * k.classes, count, k.classes);
  adv.write(k.grad_adv + first * k.classes, count, k.classes);
}

template <typename L, typename T>
DTF_INLINE void block_of_rows(const MartLoss<T>& k, int64_t first, int64_t count) {
  RowBlock<T, L> clean, adv;
  clean.read(k.clean + first * k.classes, count, k.classes);
  adv.read(k.adv + first * k.classes, count, k.classes);
  const BlockLabels<L> labels(k.labels + first, count, k.classes);
  const Peaks<L> clean_peaks = rank(clean, labels, k.classes).peaks;
  const Ranking<L> adv_ranks = rank(adv, labels, k.classes);
  const L clean_max = clean_peaks.maximum(), adv_max = adv_ranks.peaks.maximum();
  const L top = finite_top(max(adv_ranks.peaks.label, adv_ranks.third));
  auto is_boosted = [&](L number) DTF_LAMBDA_INLINE { return select(adv_ranks.rival == number, L(1), L(0)); };
  MartSums<L> sums;
  for_classes<L>(k.classes, [&](int64_t c, L number) DTF_LAMBDA_INLINE {
    sums.add(clean[c] - clean_max, adv[c] - adv_max, adv[c] - top, labels.is(number), is_boosted(number));
  });
  const MartRow<L> row{sums,           clean_peaks,     adv_ranks.peaks,       top,
                       L::all(k.beta), L::all(k.slack), L::all(k.weight_slack)};
  store_results(k, first, count, row);
  for_classes<L>(k.classes, [&](int64_t c, L number) DTF_LAMBDA_INLINE {
    EntropyKLGrad<L> g = row.grad(clean[c], adv[c], labels.is(number), is_boosted(number));
    clean.set(c, g.clean);
    adv.set(c, g.adv);
  });
  clean.write(k.grad_clean + first * k.classes, count, k.classes);
  adv.write(k.grad_adv + first * k.classes, count, k.classes);
}

// ---- many classes: a lane is a class -------------------------------------------------------------------------------

// Reads a row into `z` and asks for the next one.
template <typename L, typename T>
DTF_INLINE Peaks<Compute<T>> read_row(const T* row, Compute<T>* z, int64_t classes, int64_t label) {
  using A = Compute<T>;
  for_lanes<L>(0, classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
    part.store(z + c, part.load(row + c, A(0)));
    prefetch(row + classes + c);
  });
  if (!is_class(label, classes)) return {std::numeric_limits<A>::quiet_NaN(), row_maximum<L>(z, classes)};
  const A label_logit = std::exchange(z[label], -std::numeric_limits<A>::infinity());
  const A rival = row_maximum<L>(z, classes);
  z[label] = label_logit;
  return {label_logit, rival};
}
template <typename L, typename A>
DTF_INLINE Peaks<L> in_lanes(const Peaks<A>& peaks) {
  return {L::all(peaks.label), L::all(peaks.rival)};
}
// The first class other than the label with the rival's logit; `classes` if that is -inf.
template <typename A>
DTF_INLINE int64_t class_of_rival(const A* z, int64_t classes, int64_t label, A rival) {
  if (rival == -std::numeric_limits<A>::infinity()) return classes;
  const int64_t found = std::find(z, z + classes, rival) - z;
  return found == label ? std::find(z + label + 1, z + classes, rival) - z : found;
}
// The largest logit of the other classes.
template <typename L, typename A>
DTF_INLINE A maximum_without(A* z, int64_t classes, int64_t index) {
  if (index == classes) return row_maximum<L>(z, classes);
  const A left_out = std::exchange(z[index], -std::numeric_limits<A>::infinity());
  const A maximum = row_maximum<L>(z, classes);
  z[index] = left_out;
  return maximum;
}

template <typename L, typename T>
DTF_INLINE void long_row(const CELoss<T>& k, int64_t i, Compute<T>* z) {
  using A = Compute<T>;
  const int64_t label = k.labels[i];
  const Peaks<L> peaks = in_lanes<L>(read_row<L>(k.logits + i * k.classes, z, k.classes, label));
  const L maximum = peaks.maximum();
  L total(0);
  for_lanes<L>(0, k.classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
    L e = exp(part.load(z + c, -std::numeric_limits<A>::infinity()) - maximum);
    part.store(z + c, e);
    total = total + e;
  });
  total = L::all(sum(total));
  store_results(k, i, 1, LabelledRow<L>{peaks, total});
  const L inverse_sum = L(1) / total;
  for_lanes<L>(0, k.classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
    part.store(k.grad + i * k.classes + c, logit_grad_ce(part.load(z + c, A(0)), inverse_sum, one_at<L>(label, c)));
  });
}

template <typename L, typename T>
DTF_INLINE void long_row(const TradesLoss<T>& k, int64_t i, Compute<T>* clean) {
  constexpr Compute<T> nothing = -std::numeric_limits<Compute<T>>::infinity();
  const int64_t start = i * k.classes, label = k.labels[i];
  Compute<T>* adv = clean + k.classes;
  const Peaks<L> clean_peaks = in_lanes<L>(read_row<L>(k.clean + start, clean, k.classes, label));
  const Peaks<L> adv_peaks = in_lanes<L>(read_row<L>(k.adv + start, adv, k.classes, label));
  const L clean_max = clean_peaks.maximum(), adv_max = adv_peaks.maximum();
  EntropyKLSums<L> lanes;
  for_lanes<L>(0, k.classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
    lanes.add(part.load(clean + c, nothing) - clean_max, part.load(adv + c, nothing) - adv_max);
  });
  const EntropyKLSums<L> sums{L::all(sum(lanes.exp_clean)), L::all(sum(lanes.exp_adv)), L::all(sum(lanes.clean_shift)),
                              L::all(sum(lanes.difference))};
  const TradesRow<L> row = trades_row(k, sums, clean_peaks, adv_peaks, L::all(k.sensitivity ? k.sensitivity[i] : 0));
  store_results(k, i, 1, row);
  for_lanes<L>(0, k.classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
    EntropyKLGrad<L> g = row.grad(part.load(clean + c, nothing), part.load(adv + c, nothing), one_at<L>(label, c));
    part.store(k.grad_clean + start + c, g.clean);
    part.store(k.grad_adv + start + c, g.adv);
  });
}

template <typename L, typename T>
DTF_INLINE void long_row(const MartLoss<T>& k, int64_t i, Compute<T>* clean) {
  using A = Compute<T>;
  constexpr A nothing = -std::numeric_limits<A>::infinity();
  const int64_t start = i * k.classes, label = k.labels[i];
  A* adv = clean + k.classes;
  const Peaks<L> clean_peaks = in_lanes<L>(read_row<L>(k.clean + start, clean, k.classes, label));
  const Peaks<A> peaks = read_row<L>(k.adv + start, adv, k.classes, label);
  const Peaks<L> adv_peaks = in_lanes<L>(peaks);
  const int64_t boosted = class_of_rival(adv, k.classes, label, peaks.rival);
  const L clean_max = clean_peaks.maximum(), adv_max = adv_peaks.maximum();
  const L top = finite_top(L::all(maximum_without<L>(adv, k.classes, boosted)));
  MartSums<L> lanes;
  for_lanes<L>(0, k.classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
    const L z = part.load(adv + c, nothing);
    lanes.add(part.load(clean + c, nothing) - clean_max, z - adv_max, z - top, one_at<L>(label, c),
              one_at<L>(boosted, c));
  });
  const MartSums<L> sums{L::all(sum(lanes.exp_wrong)), L::all(sum(lanes.difference)), L::all(sum(lanes.exp_rest))};
  const MartRow<L> row{sums, clean_peaks, adv_peaks, top, L::all(k.beta), L::all(k.slack), L::all(k.weight_slack)};
  store_results(k, i, 1, row);
  for_lanes<L>(0, k.classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
    EntropyKLGrad<L> g = row.grad(part.load(clean + c, nothing), part.load(adv + c, nothing), one_at<L>(label, c),
                                  one_at<L>(boosted, c));
    part.store(k.grad_clean + start + c, g.clean);
    part.store(k.grad_adv + start + c, g.adv);
  });
}

// ---- any number of classes -----------------------------------------------------------------------------------------

template <int Bytes, template <typename> typename Kernel, typename T>
DTF_INLINE void robust_loss(const Kernel<T>& k, int64_t begin, int64_t end) {
  using L = Lanes<Compute<T>, Bytes>;
  std::unique_ptr<Compute<T>[]> rows;  // room for two
  if (k.classes > kMaxClassesLaneIsRow) rows.reset(new Compute<T>[2 * k.classes]);
  for_rows<L>(
      begin, end, k.classes, [&](int64_t first, int64_t count) DTF_LAMBDA_INLINE { block_of_rows<L>(k, first, count); },
      [&](int64_t i) DTF_LAMBDA_INLINE { long_row<L>(k, i, rows.get()); });
}

}  // namespace

DTF_DEFINE_KERNEL(CELoss, robust_loss)
DTF_DEFINE_KERNEL(TradesLoss, robust_loss)
DTF_DEFINE_KERNEL(MartLoss, robust_loss)

}  // namespace dtf
