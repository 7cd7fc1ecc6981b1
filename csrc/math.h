// The mathematics of every operator, written once.
//
// Each function is a template over the value type V: a float or double on the host or in a CUDA thread, or a vector of
// lanes (cpu/simd.h) on the CPU. V needs + - * / comparisons and exp, log, sqrt, floor, abs and select; for
// scalars they are defined here. Nothing else in csrc/ contains a formula.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define DTF_INLINE __host__ __device__ __forceinline__
#else
#define DTF_INLINE inline __attribute__((always_inline))
#endif

namespace dtf {

// The scalar type of a value, whose precision decides how functions are approximated.
template <typename V>
struct ScalarOf {
  using type = V;
};

// ---- scalar primitives ------------------------------------------------------------------------------------------

DTF_INLINE float exp(float x) { return ::expf(x); }
DTF_INLINE double exp(double x) { return ::exp(x); }
DTF_INLINE float log(float x) { return ::logf(x); }
DTF_INLINE double log(double x) { return ::log(x); }
DTF_INLINE float sqrt(float x) { return ::sqrtf(x); }
DTF_INLINE double sqrt(double x) { return ::sqrt(x); }
DTF_INLINE float floor(float x) { return ::floorf(x); }
DTF_INLINE double floor(double x) { return ::floor(x); }
DTF_INLINE float abs(float x) { return ::fabsf(x); }
DTF_INLINE double abs(double x) { return ::fabs(x); }
template <typename V>
DTF_INLINE V select(bool condition, V yes, V no) {
  return condition ? yes : no;
}

// The larger value; a NaN in b is dropped, one in a comes out of the sums that follow.
template <typename V>
DTF_INLINE V max(V a, V b) {
  return select(b > a, b, a);
}
template <typename V>
DTF_INLINE V min(V a, V b) {
  return select(b < a, b, a);
}
// Clamp that keeps NaN.
template <typename V>
DTF_INLINE V clamp(V x, V lower, V upper) {
  return min(max(x, lower), upper);
}

// ---- rows: softmax, entropy, KL ---------------------------------------------------------------------------------

// What turns logits into log-probabilities: log p = (z - maximum) - log_sum. The two are kept apart because their sum
// would lose the digits of log_sum when the logits are large.
template <typename V>
struct Normaliser {
  V maximum, log_sum;

  DTF_INLINE V log_prob(V z) const { return (z - maximum) - log_sum; }
};

// 0 * value = 0 even where value is infinite (a class of zero probability counts nothing).
template <typename V>
DTF_INLINE V weighted(V probability, V value) {
  return select(probability == V(0), V(0), probability * value);
}

// H(p) = log s - sum e (z - m) / s, with s = sum e and shift = sum e (z - m)
template <typename V>
DTF_INLINE V entropy_of(V exp_sum, V shift) {
  return log(exp_sum) - shift / exp_sum;
}

// KL(p || p') = sum e ((z - m) - (z' - m')) / s - log s + log s'; rounding may not make it negative
template <typename V>
DTF_INLINE V kl_of(V difference, V exp_clean, V exp_adv) {
  return max(difference / exp_clean - log(exp_clean) + log(exp_adv), V(0));
}

// Sums over the classes of one row of clean logits z (maximum m) and adversarial logits z' (maximum m').
template <typename V>
struct EntropyKLSums {
  V exp_clean = V(0);    // sum e,  e  = exp(z - m)
  V exp_adv = V(0);      // sum e', e' = exp(z' - m')
  V clean_shift = V(0);  // sum e (z - m)
  V difference = V(0);   // sum e ((z - m) - (z' - m'))

  DTF_INLINE void add(V clean, V adv) {  // both relative to their maximum
    V e = exp(clean);
    exp_clean = exp_clean + e;
    exp_adv = exp_adv + exp(adv);
    clean_shift = clean_shift + weighted(e, clean);
    difference = difference + weighted(e, clean - adv);
  }
  DTF_INLINE V entropy() const { return entropy_of(exp_clean, clean_shift); }
  DTF_INLINE V kl() const { return kl_of(difference, exp_clean, exp_adv); }
};

// Gradients of grad_entropy * H(p) + grad_kl * KL(p || p') for one class.
template <typename V>
struct EntropyKLGrad {
  V clean, adv;
};
// dH/dz = -p (log p + H)
template <typename V>
DTF_INLINE V entropy_grad(V p, V log_p, V entropy) {
  return -weighted(p, log_p + entropy);
}
// dKL/dz = p (log p - log p' - KL), dKL/dz' = p' - p
template <typename V>
DTF_INLINE EntropyKLGrad<V> kl_grad(V p, V q, V log_p, V log_q, V kl) {
  return {weighted(p, log_p - log_q - kl), q - p};
}

// All of the gradient of one class of one row: grad_entropy and grad_kl are what comes in from the two results, each
// only where it is wanted.
template <typename V>
struct EntropyKLGradTerms {
  V grad_entropy, grad_kl, entropy, kl;
  Normaliser<V> clean, adv;
  bool has_entropy, has_kl;

  DTF_INLINE EntropyKLGrad<V> operator()(V clean_logit, V adv_logit) const {
    V log_p = clean.log_prob(clean_logit), p = exp(log_p);
    EntropyKLGrad<V> total{V(0), V(0)};
    if (has_kl) {
      V log_q = adv.log_prob(adv_logit);
      EntropyKLGrad<V> g = dtf::kl_grad(p, exp(log_q), log_p, log_q, kl);
      total = {grad_kl * g.clean, grad_kl * g.adv};
    }
    if (has_entropy) total.clean = total.clean + grad_entropy * dtf::entropy_grad(p, log_p, entropy);
    return total;
  }
};

// Entropy alone: sums over one row.
template <typename V>
struct EntropySums {
  V exp_sum = V(0);
  V shift = V(0);

  DTF_INLINE void add(V z) {  // relative to the maximum
    V e = exp(z);
    exp_sum = exp_sum + e;
    shift = shift + weighted(e, z);
  }
  DTF_INLINE V entropy() const { return entropy_of(exp_sum, shift); }
};

// d KL(p || p') / dz' = p' - p, with p' = e' / s' given as e' and 1 / s'
template <typename V>
DTF_INLINE V logit_grad_kl(V exp_adv, V inverse_sum, V clean_log_prob) {
  return exp_adv * inverse_sum - exp(clean_log_prob);
}
// d CE(z, y) / dz = softmax(z) - onehot(y); target is 1 for the class y, else 0
template <typename V>
DTF_INLINE V logit_grad_ce(V exp_logit, V inverse_sum, V target) {
  return exp_logit * inverse_sum - target;
}

// Whether a label names a class.
DTF_INLINE bool is_class(int64_t label, int64_t classes) { return label >= 0 && label < classes; }

// lambda(x) = clip(base + alpha H + beta ||g||, minimum, maximum)
template <typename V>
struct Weighting {
  V base, alpha, beta, minimum, maximum;

  DTF_INLINE V unclipped(V entropy, V sensitivity) const { return base + alpha * entropy + beta * sensitivity; }
  DTF_INLINE V clip(V weight) const { return clamp(weight, minimum, maximum); }
};

// ---- rows: training losses --------------------------------------------------------------------------------------

// Of one row: the logit of its label y, and the largest of the other classes (-inf if there are none). A label that is
// no class has the logit NaN, so that everything that comes of the row is NaN.
template <typename V>
struct Peaks {
  V label, rival;

  DTF_INLINE V maximum() const { return max(label, rival); }
};

// A row of logits and its label.
template <typename V>
struct LabelledRow {
  Peaks<V> peaks;
  V exp_sum;  // sum exp(z - m)
  Normaliser<V> all{peaks.maximum(), log(exp_sum)};

  // CE = -log p_y
  DTF_INLINE V ce() const { return -all.log_prob(peaks.label); }
  // max_{k != y} p_k - p_y
  DTF_INLINE V margin() const { return exp(all.log_prob(peaks.rival)) - exp(all.log_prob(peaks.label)); }
};

// TRADES, and D-TRADES where alpha or beta are not 0, of one row:
//   loss = CE(z, y) + w KL(p || p'),   w = clip(base + alpha H(p) + beta s, minimum, maximum)
template <typename V>
struct TradesRow {
  EntropyKLSums<V> sums;
  Peaks<V> clean_peaks, adv_peaks;
  V sensitivity;
  Weighting<V> weighting;
  bool entropy_gradient;  // whether w depends on z in the gradient

  LabelledRow<V> clean{clean_peaks, sums.exp_clean}, adv{adv_peaks, sums.exp_adv};
  V entropy = sums.entropy(), kl = sums.kl();
  V unclipped = weighting.unclipped(entropy, sensitivity);
  V weight = weighting.clip(unclipped);
  // dloss/dw where w is not clipped, else 0
  V grad_weight = select(unclipped == weight, kl, V(0));

  DTF_INLINE V loss() const { return clean.ce() + weight * kl; }
  DTF_INLINE V grad_sensitivity() const { return weighting.beta * grad_weight; }
  // p - onehot(y) + w dKL/dz + alpha KL dH/dz, w dKL/dz'
  DTF_INLINE EntropyKLGrad<V> grad(V clean_logit, V adv_logit, V is_label) const {
    V log_p = clean.all.log_prob(clean_logit), p = exp(log_p), log_q = adv.all.log_prob(adv_logit);
    EntropyKLGrad<V> g = kl_grad(p, exp(log_q), log_p, log_q, kl);
    V through_weight = V(0);
    if (entropy_gradient) through_weight = weighting.alpha * grad_weight * entropy_grad(p, log_p, entropy);
    return {p - is_label + weight * g.clean + through_weight, weight * g.adv};
  }
};

// MART's boosted cross-entropy of one row, with k the most probable class other than y (the first of equals; none if
// C = 1):
//   BCE = -log p_y - log(1 - p_k + slack),   slack = 0 by default, 1e-4 as published
// 1 - p_k = sum_{j != k} p_j comes from a sum of its own over the classes other than k, relative to their largest logit
// (`top`, at least the lowest finite number), so that no digits are lost where p_k is close to 1. If each of them has
// the logit -inf, 1 - p_k = 0, and the second term has no gradient.
template <typename V>
DTF_INLINE V finite_top(V maximum) {
  return max(maximum, V(-std::numeric_limits<typename ScalarOf<V>::type>::max()));
}
template <typename V>
struct BoostedRow {
  Peaks<V> peaks;
  V top, exp_rest;  // exp_rest = sum_{j != k} exp(z_j - top)
  V slack;

  V exp_boosted = exp(peaks.rival - peaks.maximum());
  LabelledRow<V> row{peaks, exp_rest * exp(top - peaks.maximum()) + exp_boosted};
  V boosted_prob = exp(row.all.log_prob(peaks.rival));
  Normaliser<V> rest{top, select(exp_rest == V(0), V(0), log(exp_rest))};
  V log_one_minus = (rest.maximum - row.all.maximum) + (rest.log_sum - row.all.log_sum);
  V one_minus = exp(log_one_minus);
  // (1 - p_k) / (1 - p_k + slack): what slack leaves of the second term's gradient
  V share = select(exp_rest == V(0), V(0), select(slack == V(0), V(1), one_minus / (one_minus + slack)));

  DTF_INLINE V bce() const { return row.ce() - select(slack == V(0), log_one_minus, log(one_minus + slack)); }
  // r_j = p_j / (1 - p_k), the probability of j among the classes other than k
  DTF_INLINE V rest_prob(V logit) const { return exp(rest.log_prob(logit)); }
  DTF_INLINE V prob(V rest_prob, V is_boosted) const {
    return select(is_boosted == V(1), boosted_prob, one_minus * rest_prob);
  }
  // p_k + share p_k for j = k,   (1 - p_k - share p_k) r_j - [j = y] for the others
  DTF_INLINE V grad(V rest_prob, V is_label, V is_boosted) const {
    V boost = share * boosted_prob;
    return select(is_boosted == V(1), boosted_prob + boost, (one_minus - boost) * rest_prob - is_label);
  }
};

// Sums over the classes of one row of clean logits z (maximum m) and adversarial logits z' (maximum m').
template <typename V>
struct MartSums {
  V exp_wrong = V(0);   // sum_{c != y} e,  e = exp(z - m)
  V difference = V(0);  // sum e ((z - m) - (z' - m'))
  V exp_rest = V(0);    // of BoostedRow

  // clean and adv relative to their maximum, rest = z' - top
  DTF_INLINE void add(V clean, V adv, V rest, V is_label, V is_boosted) {
    V e = exp(clean);
    exp_wrong = exp_wrong + select(is_label == V(1), V(0), e);
    difference = difference + weighted(e, clean - adv);
    exp_rest = exp_rest + select(is_boosted == V(1), V(0), exp(rest));
  }
};

// MART of one row: loss = BCE(z', y) + beta w KL(p || p'),   w = 1 - p_y + weight_slack.
template <typename V>
struct MartRow {
  MartSums<V> sums;
  Peaks<V> clean_peaks, adv_peaks;
  V top, beta, slack, weight_slack;

  BoostedRow<V> adv{adv_peaks, top, sums.exp_rest, slack};
  V exp_label = exp(clean_peaks.label - clean_peaks.maximum());
  V exp_clean = sums.exp_wrong + exp_label;
  Normaliser<V> clean{clean_peaks.maximum(), log(exp_clean)};
  V kl = kl_of(sums.difference, exp_clean, adv.row.exp_sum);
  V label_prob = exp_label / exp_clean, wrong_prob = sums.exp_wrong / exp_clean;  // p_y, 1 - p_y
  V weight = wrong_prob + weight_slack;

  DTF_INLINE V loss() const { return adv.bce() + beta * weight * kl; }
  // beta (w dKL/dz + KL dw/dz), dBCE/dz' + beta w dKL/dz', with dw/dz = p_y p, -p_y (1 - p_y) for the label
  DTF_INLINE EntropyKLGrad<V> grad(V clean_logit, V adv_logit, V is_label, V is_boosted) const {
    V log_p = clean.log_prob(clean_logit), p = exp(log_p), rest_prob = adv.rest_prob(adv_logit);
    V q = adv.prob(rest_prob, is_boosted);
    EntropyKLGrad<V> g = kl_grad(p, q, log_p, adv.row.all.log_prob(adv_logit), kl);
    V weight_grad = label_prob * select(is_label == V(1), -wrong_prob, p);
    return {beta * (weight * g.clean + kl * weight_grad),
            adv.grad(rest_prob, is_label, is_boosted) + beta * weight * g.adv};
  }
};

// ---- pixels: projection, stationarity, random numbers -----------------------------------------------------------

// 1, -1, 0, or NaN for NaN
template <typename V>
DTF_INLINE V sign(V x) {
  return select(x > V(0), V(1), select(x < V(0), V(-1), x));
}

// clip(clip(x' + step sign(g), x - epsilon, x + epsilon), lower, upper)
template <typename V>
DTF_INLINE V pgd_linf(V adv, V grad, V clean, V step_size, V epsilon, V lower, V upper) {
  V moved = clamp(adv + step_size * sign(grad), clean - epsilon, clean + epsilon);
  return clamp(select(clean == clean, moved, clean), lower, upper);  // a NaN bound would not clamp
}
// The L2 step in two parts, with the two norms between them: delta = x' + (step / ||g||) g - x, then
// x' = clip(x + shrink delta, lower, upper).
template <typename V>
DTF_INLINE V pgd_l2_delta(V adv, V grad, V clean, V step_over_norm) {
  return adv + grad * step_over_norm - clean;
}
template <typename V>
DTF_INLINE V pgd_l2_project(V clean, V delta, V shrink, V lower, V upper) {
  return clamp(clean + delta * shrink, lower, upper);
}
// step / ||g||; a sample without gradient does not move, nor one whose gradient is too small for the quotient
template <typename V>
DTF_INLINE V l2_step(V step_size, V norm) {
  V scale = select(norm == V(0), V(0), step_size / norm);
  return select(scale == V(INFINITY), V(0), scale);
}
// min(1, epsilon / ||delta||)
template <typename V>
DTF_INLINE V l2_shrink(V epsilon, V norm) {
  return select(norm > epsilon, epsilon / norm, V(1) + V(0) * norm);
}

// One pixel's share of the first-order stationary condition, max(g (hi - x'), g (lo - x')), within ball and box.
template <typename V>
DTF_INLINE V fosc(V grad, V adv, V clean, V epsilon, V lower, V upper) {
  V up = grad * (min(clean + epsilon, upper) - adv);
  V down = grad * (max(clean - epsilon, lower) - adv);
  return max(up, down);
}

// Philox4x32-10 (Salmon et al. 2011): four words from the counter (block, draw, index) and a 64-bit key.
struct PhiloxKey {
  uint32_t k0, k1;
};
DTF_INLINE uint32_t mulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}
template <typename Word>  // Word: uint32_t, or lanes of it with mulhi
DTF_INLINE void philox(Word (&c)[4], PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    Word hi0 = mulhi(c[0], 0xD2511F53u), lo0 = c[0] * 0xD2511F53u;
    Word hi1 = mulhi(c[2], 0xCD9E8D57u), lo1 = c[2] * 0xCD9E8D57u;
    c[0] = hi1 ^ c[1] ^ key.k0;
    c[1] = lo1;
    c[2] = hi0 ^ c[3] ^ key.k1;
    c[3] = lo0;
    key.k0 += 0x9E3779B9u;
    key.k1 += 0xBB67AE85u;
  }
}
// The four words of a sample's stream number `draw` that elements 4 block .. 4 block + 3 use.
template <typename Word>
DTF_INLINE void random_words(Word (&words)[4], Word block, uint32_t draw, int64_t index, uint64_t key) {
  words[0] = block, words[1] = Word(draw);
  words[2] = Word(static_cast<uint32_t>(index));
  words[3] = Word(static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32));
  philox(words, {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)});
}

// From the upper 24 bits of a word, exact in float: U[-1, 1), U(0, 1], U[0, 1).
template <typename V>
DTF_INLINE V uniform_symmetric(V bits24) {
  return bits24 * V(0x1p-23) - V(1);
}
template <typename V>
DTF_INLINE V uniform_positive(V bits24) {
  return (bits24 + V(1)) * V(0x1p-24);
}
template <typename V>
DTF_INLINE V uniform(V bits24) {
  return bits24 * V(0x1p-24);
}

template <typename V>
struct Pair {
  V first, second;
};
// cos(pi r) and sin(pi r) for |r| <= 1/4, by polynomials: the general cos and sin have a slow range reduction, which
// needs local memory on a GPU. For float fitted to a relative error of 3e-9, for double the Taylor series to 1e-17.
template <typename V>
DTF_INLINE Pair<V> cossin_pi(V r, float) {
  V t = r * r;
  V s = r *
        (V(3.14159274f) + t * (V(-5.16771278f) + t * (V(2.55016359f) + t * (V(-0.599228796f) + t * V(0.0812295745f)))));
  V c = V(1) + t * (V(-4.9348022f) + t * (V(4.05871057f) + t * (V(-1.33513781f) + t * V(0.232125414f))));
  return {c, s};
}
template <typename V>
DTF_INLINE Pair<V> cossin_pi(V r, double) {
  V x = r * V(3.141592653589793), t = x * x, c(1), s(1);
  for (int n = 18; n >= 2; n -= 2) {
    c = V(1) - t * c * V(1.0 / (n * (n - 1)));
    s = V(1) - t * s * V(1.0 / (n * (n + 1)));
  }
  return {c, x * s};
}
// cos(2 pi u), sin(2 pi u) for u in [0, 1), by the nearest quarter turn and what is left of it.
template <typename V>
DTF_INLINE Pair<V> cossin_2pi(V u) {
  V quarter = floor(u * V(4) + V(0.5));
  Pair<V> rest = cossin_pi(u * V(2) - quarter * V(0.5), typename ScalarOf<V>::type{});
  V c = rest.first, s = rest.second;
  V cosine = select(quarter == V(1), -s, select(quarter == V(2), -c, select(quarter == V(3), s, c)));
  V sine = select(quarter == V(1), c, select(quarter == V(2), -s, select(quarter == V(3), -c, s)));
  return {cosine, sine};
}

// Two standard normals from two words' upper 24 bits (Box and Muller 1958).
template <typename V>
DTF_INLINE Pair<V> normals(V bits24_a, V bits24_b) {
  V radius = sqrt(V(-2) * log(uniform_positive(bits24_a)));
  Pair<V> turn = cossin_2pi(uniform(bits24_b));
  return {radius * turn.first, radius * turn.second};
}

// The point of the L2 start: x + radius v^(1/d) n / ||n||, v uniform in (0, 1]
template <typename V>
DTF_INLINE V l2_start_scale(V radius, V v, V dimension, V norm) {
  return radius * exp(log(v) / dimension) / norm;
}

}  // namespace dtf
