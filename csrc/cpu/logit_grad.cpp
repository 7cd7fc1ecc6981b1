#include <memory>

#include "kernels.h"
#include "rows.h"

namespace dtf {
namespace {

// Both operators: exponentials of each row, their sum, then what is subtracted. finish_block(exps, 1 / sum, first,
// count) turns a block of rows into gradients in place, finish_row(exps, 1 / sum, row, class, part) one vector of a
// long row.
template <typename L, typename T, typename BlockFinish, typename RowFinish>
DTF_INLINE void softmax_minus(const T* logits, T* grad, int64_t classes, int64_t begin, int64_t end,
                              BlockFinish finish_block, RowFinish finish_row) {
  using A = Compute<T>;
  std::unique_ptr<A[]> exps;  // one long row
  if (classes > kMaxClassesLaneIsRow) exps.reset(new A[classes]);
  for_rows<L>(
      begin, end, classes,
      [&](int64_t first, int64_t count) DTF_LAMBDA_INLINE {
        RowBlock<T, L> block;
        block.read(logits + first * classes, count, classes);
        L m = row_maximum(block, classes), total(0);
        for (int64_t c = 0; c < classes; ++c) {
          L e = exp(block[c] - m);
          block.set(c, e);
          total = total + e;
        }
        finish_block(block, L(1) / total, first, count);
        block.write(grad + first * classes, count, classes);
      },
      [&](int64_t row) DTF_LAMBDA_INLINE {
        const T* z = logits + row * classes;
        constexpr A nothing = -std::numeric_limits<A>::infinity();
        L m = L::all(row_maximum<L>(z, classes)), total(0);
        for_lanes<L>(0, classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
          L e = exp(part.load(z + c, nothing) - m);
          prefetch(z + classes + c);
          part.store(exps.get() + c, e);
          total = total + e;
        });
        L inverse_sum = L::all(A(1) / sum(total));
        for_lanes<L>(0, classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
          part.store(grad + row * classes + c, finish_row(part.load(exps.get() + c, A(0)), inverse_sum, row, c, part));
        });
      });
}

template <int Bytes, typename T>
DTF_INLINE void kl(const LogitGradKL<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using L = Lanes<A, Bytes>;
  softmax_minus<L>(
      k.adv, k.grad, k.classes, begin, end,
      [&](RowBlock<T, L>& exps, L inverse_sum, int64_t first, int64_t count) DTF_LAMBDA_INLINE {
        RowBlock<T, L> log_probs;
        log_probs.read(k.clean_log_probs + first * k.classes, count, k.classes);
        for (int64_t c = 0; c < k.classes; ++c) exps.set(c, logit_grad_kl(exps[c], inverse_sum, log_probs[c]));
      },
      [&](L e, L inverse_sum, int64_t row, int64_t c, auto part) DTF_LAMBDA_INLINE {
        return logit_grad_kl(e, inverse_sum, part.load(k.clean_log_probs + row * k.classes + c, A(0)));
      });
}

template <int Bytes, typename T>
DTF_INLINE void ce(const LogitGradCE<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using L = Lanes<A, Bytes>;
  constexpr A nan = std::numeric_limits<A>::quiet_NaN();
  auto invalid = [&](int64_t row) DTF_LAMBDA_INLINE { return !is_class(k.labels[row], k.classes); };
  softmax_minus<L>(
      k.logits, k.grad, k.classes, begin, end,
      [&](RowBlock<T, L>& exps, L inverse_sum, int64_t first, int64_t count) DTF_LAMBDA_INLINE {
        const BlockLabels<L> labels(k.labels + first, count, k.classes);
        inverse_sum = select(labels.missing == labels.missing, inverse_sum, labels.missing);
        for_classes<L>(k.classes, [&](int64_t c, L number) DTF_LAMBDA_INLINE {
          exps.set(c, logit_grad_ce(exps[c], inverse_sum, labels.is(number)));
        });
      },
      [&](L e, L inverse_sum, int64_t row, int64_t c, auto) DTF_LAMBDA_INLINE {
        if (invalid(row)) return L(nan);
        return logit_grad_ce(e, inverse_sum, one_at<L>(k.labels[row], c));
      });
}

}  // namespace

DTF_DEFINE_KERNEL(LogitGradKL, kl)
DTF_DEFINE_KERNEL(LogitGradCE, ce)

}  // namespace dtf
