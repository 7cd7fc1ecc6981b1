// Vectors of lanes on the CPU, on top of GCC's vector extensions, and run-time dispatch on the instruction set.
//
// A Lanes<T> is 64 bytes: one register with AVX-512, two with AVX2, four with SSE or NEON. Every helper is
// always_inline, so that it is compiled for the instruction set of the kernel it ends up in.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "../math.h"

// A kernel marked DTF_CLONES is compiled for several x86-64 levels; the loader picks the best one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DTF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define DTF_HAS_CLONES 1
#else
#define DTF_CLONES
#define DTF_HAS_CLONES 0
#endif

// For lambdas, which would otherwise not be compiled for the instruction set of the kernel around them.
#define DTF_LAMBDA_INLINE __attribute__((always_inline))

// A kernel is a struct of arguments `Kernel<T>` and a function body(kernel, begin, end) over a range of rows, samples
// or elements; these make it callable as run(kernel, begin, end) for each dtype.
#define DTF_DECLARE_KERNEL(Kernel)                   \
  void run(const Kernel<float>&, int64_t, int64_t);  \
  void run(const Kernel<double>&, int64_t, int64_t); \
  void run(const Kernel<Half>&, int64_t, int64_t);   \
  void run(const Kernel<BFloat16>&, int64_t, int64_t)
#define DTF_DEFINE_KERNEL_FOR(Kernel, T, body) \
  DTF_CLONES void run(const Kernel<T>& kernel, int64_t begin, int64_t end) { body(kernel, begin, end); }
#define DTF_DEFINE_KERNEL(Kernel, body)       \
  DTF_DEFINE_KERNEL_FOR(Kernel, float, body)  \
  DTF_DEFINE_KERNEL_FOR(Kernel, double, body) \
  DTF_DEFINE_KERNEL_FOR(Kernel, Half, body)   \
  DTF_DEFINE_KERNEL_FOR(Kernel, BFloat16, body)

namespace dtf {

// Storage of half precision: the bits; all arithmetic happens in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type that T is computed in.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

template <typename T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

template <typename T>
struct Lanes {
  static constexpr int width = 64 / sizeof(T);
  using Native [[gnu::vector_size(64)]] = T;
  using Integer = typename IntOf<T>::type;
  using Mask [[gnu::vector_size(64)]] = Integer;
  Native v;

  Lanes() = default;
  DTF_INLINE Lanes(Native native) : v(native) {}
  template <typename S>
    requires std::is_arithmetic_v<S>
  DTF_INLINE explicit(false) Lanes(S scalar) : v(static_cast<T>(scalar) - Native{}) {}
};

#define DTF_BINARY(op)                                      \
  template <typename T>                                     \
  DTF_INLINE Lanes<T> operator op(Lanes<T> a, Lanes<T> b) { \
    return Lanes<T>(a.v op b.v);                            \
  }
DTF_BINARY(+)
DTF_BINARY(-)
DTF_BINARY(*)
DTF_BINARY(/)
#undef DTF_BINARY
#define DTF_COMPARE(op)                                 \
  template <typename T>                                 \
  DTF_INLINE auto operator op(Lanes<T> a, Lanes<T> b) { \
    return a.v op b.v;                                  \
  }
DTF_COMPARE(<)
DTF_COMPARE(>)
DTF_COMPARE(==)
#undef DTF_COMPARE
template <typename T>
DTF_INLINE Lanes<T> operator-(Lanes<T> a) {
  return Lanes<T>(-a.v);
}

template <typename T>
DTF_INLINE Lanes<T> select(typename Lanes<T>::Mask condition, Lanes<T> yes, Lanes<T> no) {
  return Lanes<T>(condition ? yes.v : no.v);
}
template <typename T>
DTF_INLINE Lanes<T> abs(Lanes<T> x) {
  using L = Lanes<T>;
  auto bits = (typename L::Mask)x.v & std::numeric_limits<typename L::Integer>::max();
  return L((typename L::Native)bits);
}
template <typename T>
DTF_INLINE Lanes<T> sqrt(Lanes<T> x) {
  Lanes<T> result;
  for (int i = 0; i < Lanes<T>::width; ++i) result.v[i] = __builtin_sqrt(x.v[i]);
  return result;
}
DTF_INLINE Lanes<float> sqrt(Lanes<float> x) {
  Lanes<float> result;
  for (int i = 0; i < Lanes<float>::width; ++i) result.v[i] = __builtin_sqrtf(x.v[i]);
  return result;
}
// floor for 0 <= x < 2^31
DTF_INLINE Lanes<float> floor(Lanes<float> x) {
  return Lanes<float>(__builtin_convertvector(__builtin_convertvector(x.v, Lanes<float>::Mask), Lanes<float>::Native));
}

// e^x: x = n ln 2 + r, |r| <= ln(2)/2, e^r = 1 + r + r^2 P(r) with a relative error of 7e-8 in r^2 P; about 1.4 ulp in
// all. Results below the smallest normal float are 0; NaN stays NaN.
DTF_INLINE Lanes<float> exp(Lanes<float> x) {
  using L = Lanes<float>;
  L bounded = min(x, L(89.f));
  L shifted = bounded * L(1.44269504f) + L(12582912.f);  // 1.5 * 2^23: rounds to an integer
  L n = shifted - L(12582912.f);
  L r = bounded - n * L(0.693359375f);  // ln 2 in two parts
  r = r + n * L(2.12194440e-4f);
  L p = ((((L(0.00139269266f) * r + L(0.00836377387f)) * r + L(0.0416665501f)) * r + L(0.166665734f)) * r + L(0.5f));
  p = p * r * r + r + L(1.f);
  // 2^n: the low bits of `shifted` hold n
  auto exponent = (((L::Mask)shifted.v - 0x4B400000) + 127) << 23;
  return select(x < L(-87.3365402f), L(0.f), p * L((L::Native)exponent));
}
// ln x for normal x > 0; x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), ln(1 + f) = f - f^2/2 + f^3 Q(f) with a
// relative error of 3e-8 in Q. NaN stays NaN.
DTF_INLINE Lanes<float> log(Lanes<float> x) {
  using L = Lanes<float>;
  L::Mask bits = (L::Mask)x.v - 0x3F3504F3;  // relative to sqrt(1/2)
  L k(__builtin_convertvector(bits >> 23, L::Native));
  L f = L((L::Native)((bits & 0x007FFFFF) + 0x3F3504F3)) - L(1.f);
  L q = L(0.0697161147f);
  for (float c : {-0.114797338f, 0.116854199f, -0.124256873f, 0.142490576f, -0.166678023f, 0.200007157f, -0.24999997f,
                  0.333333312f})
    q = q * f + L(c);
  L result = f * f * f * q - L(0.5f) * f * f + k * L(-2.12194440e-4f) + f + k * L(0.693359375f);
  return select(x == x, result, x);
}
// double is the precision of tests and gradient checks: the C library, lane by lane
DTF_INLINE Lanes<double> exp(Lanes<double> x) {
  for (int i = 0; i < Lanes<double>::width; ++i) x.v[i] = __builtin_exp(x.v[i]);
  return x;
}
DTF_INLINE Lanes<double> log(Lanes<double> x) {
  for (int i = 0; i < Lanes<double>::width; ++i) x.v[i] = __builtin_log(x.v[i]);
  return x;
}
DTF_INLINE Pair<Lanes<float>> cossin_2pi(Lanes<float> u) { return cossin_2pi_polynomial(u); }
DTF_INLINE Pair<Lanes<double>> cossin_2pi(Lanes<double> u) {
  Pair<Lanes<double>> result;
  for (int i = 0; i < Lanes<double>::width; ++i) {
    Pair<double> one = cossin_2pi(u.v[i]);
    result.first.v[i] = one.first;
    result.second.v[i] = one.second;
  }
  return result;
}

// Reductions over the lanes, always in the same order: halves, quarters, ...
template <typename T>
DTF_INLINE T sum(Lanes<T> x) {
  for (int half = Lanes<T>::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] = x.v[i] + x.v[i + half];
  return x.v[0];
}
template <typename T>
DTF_INLINE T maximum(Lanes<T> x) {
  for (int half = Lanes<T>::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] = max(x.v[i], x.v[i + half]);
  return x.v[0];
}

// ---- loads and stores, with conversion to and from half precision -------------------------------------------------

using Bits [[gnu::vector_size(64)]] = uint32_t;
using Bits16 [[gnu::vector_size(32)]] = uint16_t;

DTF_INLINE Lanes<float> widen(Bits16 raw, BFloat16) {
  return Lanes<float>((Lanes<float>::Native)(__builtin_convertvector(raw, Bits) << 16));
}
DTF_INLINE Lanes<float> widen(Bits16 raw, Half) {
  // Move exponent and mantissa into place and rescale by 2^112, which also normalises subnormals; inf and NaN keep
  // their all-ones exponent.
  using L = Lanes<float>;
  Bits bits = __builtin_convertvector(raw, Bits);
  Bits magnitude = (bits & 0x7FFFu) << 13, sign = (bits & 0x8000u) << 16;
  L scaled = L((L::Native)magnitude) * L(0x1p112f);
  Bits special = (Bits)(magnitude >= 0x0F800000u) & 0x7F800000u;
  return L((L::Native)((Bits)scaled.v | sign | special));
}
DTF_INLINE Bits16 narrow(Lanes<float> x, BFloat16) {  // to nearest even
  Bits bits = (Bits)x.v;
  Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  Bits is_nan = (Bits)(x.v != x.v);
  return __builtin_convertvector((is_nan & 0x7FC0u) | (~is_nan & rounded), Bits16);
}
DTF_INLINE Bits16 narrow(Lanes<float> x, Half) {  // to nearest even, subnormals included
  using L = Lanes<float>;
  Bits sign = ((Bits)x.v >> 16) & 0x8000u;
  L magnitude = abs(x);
  Bits bits = (Bits)magnitude.v;
  // normal: rebias, round on the 13 bits that fall away
  Bits normal = (bits - 0x38000000u + 0x0FFFu + ((bits >> 13) & 1u)) >> 13;
  // subnormal: adding 2^-1 * 2^... lets the float addition do the rounding at 2^-24
  Bits tiny = (Bits)(magnitude + L(0.5f)).v - 0x3F000000u;
  Bits is_tiny = (Bits)(bits < 0x38800000u);
  Bits result = (is_tiny & tiny) | (~is_tiny & normal);
  Bits is_large = (Bits)(bits >= 0x477FF000u);  // 65520 and above round to infinity
  result = (is_large & 0x7C00u) | (~is_large & result);
  Bits is_nan = (Bits)(bits > 0x7F800000u);
  result = (is_nan & 0x7E00u) | (~is_nan & result);
  return __builtin_convertvector(result | sign, Bits16);
}

template <typename T>
DTF_INLINE Lanes<T> load(const T* from) {
  Lanes<T> x;
  std::memcpy(&x.v, from, sizeof x.v);
  return x;
}
template <typename T>
DTF_INLINE void store(T* to, Lanes<T> x) {
  std::memcpy(to, &x.v, sizeof x.v);
}
template <typename T>
  requires(sizeof(T) == 2)
DTF_INLINE Lanes<float> load(const T* from) {
  Bits16 raw;
  std::memcpy(&raw, from, sizeof raw);
  return widen(raw, T{});
}
template <typename T>
  requires(sizeof(T) == 2)
DTF_INLINE void store(T* to, Lanes<float> x) {
  Bits16 raw = narrow(x, T{});
  std::memcpy(to, &raw, sizeof raw);
}

// The first `count` lanes; the others are `fill` when loaded and not written when stored.
template <typename T>
DTF_INLINE Lanes<Compute<T>> load_part(const T* from, int64_t count, Compute<T> fill) {
  using L = Lanes<Compute<T>>;
  T raw[L::width] = {};
  std::memcpy(raw, from, static_cast<size_t>(count) * sizeof(T));
  L x = load(raw);
  for (int i = 0; i < L::width; ++i) x.v[i] = i < count ? x.v[i] : fill;
  return x;
}
template <typename T>
DTF_INLINE void store_part(T* to, Lanes<Compute<T>> x, int64_t count) {
  T raw[Lanes<Compute<T>>::width];
  store(raw, x);
  std::memcpy(to, raw, static_cast<size_t>(count) * sizeof(T));
}

// Calls step(i, load, store) for each full vector of [begin, end) and once for the tail. load(pointer, fill) and
// store(pointer, value) then work on the right number of elements, so that one body serves both.
struct Whole {
  template <typename T>
  DTF_INLINE Lanes<Compute<T>> load(const T* from, Compute<T>) const {
    return dtf::load(from);
  }
  template <typename T>
  DTF_INLINE void store(T* to, Lanes<Compute<T>> x) const {
    dtf::store(to, x);
  }
};
struct Part {
  int64_t count;
  template <typename T>
  DTF_INLINE Lanes<Compute<T>> load(const T* from, Compute<T> fill) const {
    return load_part(from, count, fill);
  }
  template <typename T>
  DTF_INLINE void store(T* to, Lanes<Compute<T>> x) const {
    store_part(to, x, count);
  }
};
template <typename A, typename Step>
DTF_INLINE void for_lanes(int64_t begin, int64_t end, Step step) {
  constexpr int width = Lanes<A>::width;
  int64_t i = begin;
  for (; i + width <= end; i += width) step(i, Whole{});
  if (i < end) step(i, Part{end - i});
}

}  // namespace dtf
