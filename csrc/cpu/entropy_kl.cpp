#include "kernels.h"
#include "rows.h"

namespace dtf {
namespace {

template <int Bytes, typename T>
DTF_INLINE void forward(const EntropyKLForward<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using L = Lanes<A, Bytes>;
  for_rows<L>(
      begin, end, k.classes,
      [&](int64_t first, int64_t count) DTF_LAMBDA_INLINE {
        RowBlock<T, L> clean, adv;
        clean.read(k.clean + first * k.classes, count, k.classes);
        adv.read(k.adv + first * k.classes, count, k.classes);
        L clean_max = row_maximum(clean, k.classes), adv_max = row_maximum(adv, k.classes);
        EntropyKLSums<L> sums;
        for (int64_t c = 0; c < k.classes; ++c) sums.add(clean[c] - clean_max, adv[c] - adv_max);
        store_part(k.entropy + first, sums.entropy(), count);
        store_part(k.kl + first, sums.kl(), count);
        RowBlock<A, L> n;
        n.set(0, clean_max), n.set(1, log(sums.exp_clean)), n.set(2, adv_max), n.set(3, log(sums.exp_adv));
        n.write(k.normalisers + 4 * first, count, 4);
      },
      [&](int64_t row) DTF_LAMBDA_INLINE {
        const T *clean = k.clean + row * k.classes, *adv = k.adv + row * k.classes;
        constexpr A nothing = -std::numeric_limits<A>::infinity();
        const A clean_max = row_maximum<L>(clean, k.classes), adv_max = row_maximum<L>(adv, k.classes);
        const L clean_shift = L::all(clean_max), adv_shift = L::all(adv_max);
        EntropyKLSums<L> lanes;
        for_lanes<L>(0, k.classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE {
          prefetch(clean + k.classes + c), prefetch(adv + k.classes + c);
          lanes.add(part.load(clean + c, nothing) - clean_shift, part.load(adv + c, nothing) - adv_shift);
        });
        EntropyKLSums<A> sums{sum(lanes.exp_clean), sum(lanes.exp_adv), sum(lanes.clean_shift), sum(lanes.difference)};
        k.entropy[row] = sums.entropy();
        k.kl[row] = sums.kl();
        A* n = k.normalisers + 4 * row;
        n[0] = clean_max, n[1] = log(sums.exp_clean), n[2] = adv_max, n[3] = log(sums.exp_adv);
      });
}

template <int Bytes, typename T>
DTF_INLINE void backward(const EntropyKLBackward<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using L = Lanes<A, Bytes>;
  const bool has_entropy = k.grad_entropy != nullptr, has_kl = k.grad_kl != nullptr;
  for_rows<L>(
      begin, end, k.classes,
      [&](int64_t first, int64_t count) DTF_LAMBDA_INLINE {
        RowBlock<T, L> clean, adv;
        clean.read(k.clean + first * k.classes, count, k.classes);
        adv.read(k.adv + first * k.classes, count, k.classes);
        RowBlock<A, L> n;
        n.read(k.normalisers + first * 4, count, 4);
        auto rows = [&](const A* values) DTF_LAMBDA_INLINE { return load_part<L>(values + first, count, A(0)); };
        EntropyKLGradTerms<L> terms{has_entropy ? rows(k.grad_entropy) : L(0),
                                    has_kl ? rows(k.grad_kl) : L(0),
                                    rows(k.entropy),
                                    rows(k.kl),
                                    {n[0], n[1]},
                                    {n[2], n[3]},
                                    has_entropy,
                                    has_kl};
        for (int64_t c = 0; c < k.classes; ++c) {
          EntropyKLGrad<L> g = terms(clean[c], adv[c]);
          clean.set(c, g.clean);
          adv.set(c, g.adv);
        }
        clean.write(k.grad_clean + first * k.classes, count, k.classes);
        adv.write(k.grad_adv + first * k.classes, count, k.classes);
      },
      [&](int64_t row) DTF_LAMBDA_INLINE {
        const A* n = k.normalisers + 4 * row;
        EntropyKLGradTerms<L> terms{L::all(has_entropy ? k.grad_entropy[row] : A(0)),
                                    L::all(has_kl ? k.grad_kl[row] : A(0)),
                                    L::all(k.entropy[row]),
                                    L::all(k.kl[row]),
                                    {L::all(n[0]), L::all(n[1])},
                                    {L::all(n[2]), L::all(n[3])},
                                    has_entropy,
                                    has_kl};
        int64_t start = row * k.classes;
        for_lanes<L>(start, start + k.classes, [&](int64_t i, auto part) DTF_LAMBDA_INLINE {
          EntropyKLGrad<L> g = terms(part.load(k.clean + i, A(0)), part.load(k.adv + i, A(0)));
          part.store(k.grad_clean + i, g.clean);
          part.store(k.grad_adv + i, g.adv);
        });
      });
}

}  // namespace

DTF_DEFINE_KERNEL(EntropyKLForward, forward)
DTF_DEFINE_KERNEL(EntropyKLBackward, backward)

}  // namespace dtf
