#include <algorithm>
#include <memory>

#include "kernels.h"
#include "rows.h"

namespace dtf {
namespace {

// Few classes: a lane is a row. A class's number is exact in a lane, too.
template <typename L, typename T>
DTF_INLINE void block_of_rows(const BoostedCE<T>& k, int64_t first, int64_t count) {
  using A = Compute<T>;
  const L nothing(-std::numeric_limits<A>::infinity());
  RowBlock<T, L> logits;
  logits.read(k.logits + first * k.classes, count, k.classes);
  L label(-1), valid(0);  // valid: 0, or NaN where the label is wrong
  for (int64_t i = 0; i < count; ++i) {
    label.set(i, static_cast<A>(k.labels[first + i]));
    if (!is_class(k.labels[first + i], k.classes)) valid.set(i, std::numeric_limits<A>::quiet_NaN());
  }

  // The logit of the label; the largest of the others and its class; the largest of those that remain.
  L label_logit = nothing, boosted_logit = nothing, boosted(-1), third = nothing;
  for (int64_t c = 0; c < k.classes; ++c) {
    auto is_label = label == L(c);
    label_logit = select(is_label, logits[c], label_logit);
    L z = select(is_label, nothing, logits[c]);
    third = max(third, min(boosted_logit, z));
    boosted = select(z > boosted_logit, L(c), boosted);
    boosted_logit = max(boosted_logit, z);
  }
  const L maximum = max(label_logit, boosted_logit), rest_maximum = max(label_logit, third);
  L total(0), rest_total(0);
  for (int64_t c = 0; c < k.classes; ++c) {
    total = total + exp(logits[c] - maximum);
    rest_total = rest_total + exp(select(boosted == L(c), nothing, logits[c]) - rest_maximum);
  }

  const BoostedCERow<L> row{{maximum, log(total) + valid}, {rest_maximum, log(rest_total)}, L(k.slack)};
  const L boosted_prob = exp(row.all.log_prob(boosted_logit));
  for (int64_t c = 0; c < k.classes; ++c) {
    auto one_at = [&](L index) DTF_LAMBDA_INLINE { return select(index == L(c), L(1), L(0)); };
    logits.set(c, row.grad(logits[c], boosted_prob, one_at(label), one_at(boosted)));
  }
  logits.write(k.grad + first * k.classes, count, k.classes);
  store_part(k.loss + first, row.loss(label_logit), count);
}

// Many classes: a lane is a class. `z` is room for a row.
template <typename L, typename T>
DTF_INLINE void long_row(const BoostedCE<T>& k, int64_t i, Compute<T>* z) {
  using A = Compute<T>;
  constexpr A nothing = -std::numeric_limits<A>::infinity(), nan = std::numeric_limits<A>::quiet_NaN();
  const int64_t classes = k.classes, label = k.labels[i];
  if (!is_class(label, classes)) {
    for_lanes<L>(0, classes,
                 [&](int64_t c, auto part) DTF_LAMBDA_INLINE { part.store(k.grad + i * classes + c, L(nan)); });
    k.loss[i] = nan;
    return;
  }
  for_lanes<L>(0, classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
    part.store(z + c, part.load(k.logits + i * classes + c, A(0)));
    prefetch(k.logits + (i + 1) * classes + c);
  });

  // The most probable class other than the label; none if those are all of logit -inf (or NaN).
  const A label_logit = std::exchange(z[label], nothing);
  const A boosted_logit = row_maximum<L>(z, classes);
  const int64_t boosted = boosted_logit == nothing ? classes : std::find(z, z + classes, boosted_logit) - z;
  z[label] = label_logit;
  // From here on the row is without it.
  if (boosted < classes) z[boosted] = nothing;
  const L maximum(max(label_logit, boosted_logit)), rest_maximum(row_maximum<L>(z, classes));
  L total(0), rest_total(0);
  for_lanes<L>(0, classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
    const L logit = part.load(z + c, nothing);
    total = total + exp(logit - maximum);
    rest_total = rest_total + exp(logit - rest_maximum);
  });
  total = L(sum(total)) + exp(L(boosted_logit) - maximum);

  const BoostedCERow<L> row{{maximum, log(total)}, {rest_maximum, log(L(sum(rest_total)))}, L(k.slack)};
  const L boosted_prob = exp(row.all.log_prob(L(boosted_logit)));
  for_lanes<L>(0, classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
    auto one_at = [&](int64_t index) DTF_LAMBDA_INLINE {
      L one(0);
      if (index >= c && index < c + L::width) one.set(index - c, A(1));
      return one;
    };
    part.store(k.grad + i * classes + c,
               row.grad(part.load(z + c, nothing), boosted_prob, one_at(label), one_at(boosted)));
  });
  store_part(k.loss + i, row.loss(L(label_logit)), 1);
}

template <int Bytes, typename T>
DTF_INLINE void boosted_ce(const BoostedCE<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using L = Lanes<A, Bytes>;
  std::unique_ptr<A[]> row;
  if (k.classes > kMaxClassesLaneIsRow) row.reset(new A[k.classes]);
  for_rows<L>(
      begin, end, k.classes, [&](int64_t first, int64_t count) DTF_LAMBDA_INLINE { block_of_rows<L>(k, first, count); },
      [&](int64_t i) DTF_LAMBDA_INLINE { long_row<L>(k, i, row.get()); });
}

}  // namespace

DTF_DEFINE_KERNEL(BoostedCE, boosted_ce)

}  // namespace dtf
