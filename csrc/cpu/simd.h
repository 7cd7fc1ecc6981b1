// Vectors of lanes on the CPU, on top of GCC's vector extensions, and run-time dispatch on the instruction set.
//
// A Lanes<T, Bytes> is 64 bytes in registers of `Bytes` bytes: one with AVX-512, two with AVX2, four with SSE or NEON.
// So every machine sums in the same order. (One 64-byte vector everywhere would do the same, but GCC takes comparisons
// and selections of vectors wider than the registers apart lane by lane, which is ten times slower.) Every helper is
// always_inline, so that it is compiled for the instruction set of the kernel it ends up in.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../math.h"
#include "../types.h"
#include "level.h"

// For lambdas, which would otherwise not be compiled for the instruction set of the kernel around them.
#define DTF_LAMBDA_INLINE __attribute__((always_inline))
// The statement for each register p of a Lanes. Not a loop: GCC takes four times as long to compile those.
#define DTF_PART(i, ...) \
  do {                   \
    constexpr int p = i; \
    __VA_ARGS__;         \
  } while (false)
#define DTF_EACH_PART(...)                             \
  do {                                                 \
    DTF_PART(0, __VA_ARGS__);                          \
    if constexpr (parts > 1) DTF_PART(1, __VA_ARGS__); \
    if constexpr (parts > 2) {                         \
      DTF_PART(2, __VA_ARGS__);                        \
      DTF_PART(3, __VA_ARGS__);                        \
    }                                                  \
  } while (false)

// A kernel is a struct of arguments `Kernel<T>` (arguments.h) and a function body<Bytes>(kernel, begin, end) over a
// range of rows, samples or elements; these make it callable as run(kernel, begin, end) for each dtype, compiled for
// every level.
#if DTF_HAS_LEVELS
#define DTF_DEFINE_KERNEL_FOR(Kernel, T, body, widest)                                                      \
  DTF_V4 static void body##_v4(const Kernel<T>& k, int64_t begin, int64_t end) { body<64>(k, begin, end); } \
  DTF_V3 static void body##_v3(const Kernel<T>& k, int64_t begin, int64_t end) { body<32>(k, begin, end); } \
  void run(const Kernel<T>& k, int64_t begin, int64_t end) {                                                \
    if (widest == Level::v4 && best_level() == Level::v4) return body##_v4(k, begin, end);                  \
    if (best_level() >= Level::v3) return body##_v3(k, begin, end);                                         \
    body<16>(k, begin, end);                                                                                \
  }
#else
#define DTF_DEFINE_KERNEL_FOR(Kernel, T, body, widest) \
  void run(const Kernel<T>& k, int64_t begin, int64_t end) { body<kRegisterBytes>(k, begin, end); }
#endif
#define DTF_DEFINE_KERNEL_UP_TO(widest, Kernel, body) \
  DTF_DEFINE_KERNEL_FOR(Kernel, float, body, widest)  \
  DTF_DEFINE_KERNEL_FOR(Kernel, double, body, widest) \
  DTF_DEFINE_KERNEL_FOR(Kernel, Half, body, widest)   \
  DTF_DEFINE_KERNEL_FOR(Kernel, BFloat16, body, widest)
#define DTF_DEFINE_KERNEL(Kernel, body) DTF_DEFINE_KERNEL_UP_TO(Level::v4, Kernel, body)

namespace dtf {

// The widest registers that the compiler's own target has, where there is no run-time dispatch.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

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

template <typename T, int Bytes = 64>
struct Lanes {
  static constexpr int width = 64 / sizeof(T);
  static constexpr int parts = 64 / Bytes, part_width = Bytes / sizeof(T);
  using Scalar = T;
  using Integer = typename IntOf<T>::type;
  using Native [[gnu::vector_size(Bytes)]] = T;
  using NativeMask [[gnu::vector_size(Bytes)]] = Integer;
  struct Mask {
    NativeMask part[parts];
  };
  Native part[parts];

  Lanes() = default;
  // For constants; see `all` for others.
  template <typename S>
    requires std::is_arithmetic_v<S>
  DTF_INLINE explicit(false) Lanes(S scalar) {
    DTF_EACH_PART(part[p] = static_cast<T>(scalar) - Native{});
  }
  // The same in all lanes, through memory, which ends as one instruction. GCC would take `x - Native{}` apart lane by
  // lane, unless x is a constant, before it is inlined where registers of this size are known.
  static DTF_INLINE Lanes all(T x) {
    T lane[part_width];
    for (T& each : lane) each = x;
    Lanes result;
    DTF_EACH_PART(std::memcpy(&result.part[p], lane, sizeof result.part[p]));
    return result;
  }
  // One lane; slow, for what happens once per row.
  DTF_INLINE void set(int i, T value) { part[i / part_width][i % part_width] = value; }
};

template <typename T, int B>
struct ScalarOf<Lanes<T, B>> {
  using type = T;
};

template <typename L, typename T>
L load(const T* from);
template <typename L, typename T>
void store(T* to, L x);

#define DTF_BINARY(op)                                               \
  template <typename T, int B>                                       \
  DTF_INLINE Lanes<T, B> operator op(Lanes<T, B> a, Lanes<T, B> b) { \
    constexpr int parts = Lanes<T, B>::parts;                        \
    DTF_EACH_PART(a.part[p] = a.part[p] op b.part[p]);               \
    return a;                                                        \
  }
DTF_BINARY(+)
DTF_BINARY(-)
DTF_BINARY(*)
DTF_BINARY(/)
#undef DTF_BINARY
#define DTF_COMPARE(op)                                                             \
  template <typename T, int B>                                                      \
  DTF_INLINE typename Lanes<T, B>::Mask operator op(Lanes<T, B> a, Lanes<T, B> b) { \
    constexpr int parts = Lanes<T, B>::parts;                                       \
    typename Lanes<T, B>::Mask mask;                                                \
    DTF_EACH_PART(mask.part[p] = a.part[p] op b.part[p]);                           \
    return mask;                                                                    \
  }
DTF_COMPARE(<)
DTF_COMPARE(>)
DTF_COMPARE(==)
#undef DTF_COMPARE

// f(register) for each register of x.
template <typename T, int B, typename F>
DTF_INLINE Lanes<T, B> map(Lanes<T, B> x, F f) {
  constexpr int parts = Lanes<T, B>::parts;
  DTF_EACH_PART(x.part[p] = f(x.part[p]));
  return x;
}
// f(lane) for each lane of x.
template <typename T, int B, typename F>
DTF_INLINE Lanes<T, B> map_lanes(Lanes<T, B> x, F f) {
  T lane[Lanes<T, B>::width];
  store(lane, x);
  for (int i = 0; i < Lanes<T, B>::width; ++i) lane[i] = f(lane[i]);
  return load<Lanes<T, B>>(lane);
}

template <typename T, int B>
DTF_INLINE Lanes<T, B> operator-(Lanes<T, B> x) {
  return map(x, [](auto v) DTF_LAMBDA_INLINE { return -v; });
}
template <typename T, int B>
DTF_INLINE Lanes<T, B> select(typename Lanes<T, B>::Mask condition, Lanes<T, B> yes, Lanes<T, B> no) {
  constexpr int parts = Lanes<T, B>::parts;
  DTF_EACH_PART(yes.part[p] = condition.part[p] ? yes.part[p] : no.part[p]);
  return yes;
}
template <typename T, int B>
DTF_INLINE Lanes<T, B> abs(Lanes<T, B> x) {
  using L = Lanes<T, B>;
  return map(x, [](auto v) DTF_LAMBDA_INLINE {
    return (typename L::Native)((typename L::NativeMask)v & std::numeric_limits<typename L::Integer>::max());
  });
}
template <int B>
DTF_INLINE Lanes<double, B> sqrt(Lanes<double, B> x) {
  return map_lanes(x, [](double v) DTF_LAMBDA_INLINE { return __builtin_sqrt(v); });
}
template <int B>
DTF_INLINE Lanes<float, B> sqrt(Lanes<float, B> x) {
  return map_lanes(x, [](float v) DTF_LAMBDA_INLINE { return __builtin_sqrtf(v); });
}
// floor for 0 <= x < 2^31
template <typename T, int B>
DTF_INLINE Lanes<T, B> floor(Lanes<T, B> x) {
  using L = Lanes<T, B>;
  return map(x, [](auto v) DTF_LAMBDA_INLINE {
    return __builtin_convertvector(__builtin_convertvector(v, typename L::NativeMask), typename L::Native);
  });
}

// e^x: x = n ln 2 + r, |r| <= ln(2)/2, e^r = 1 + r + r^2 P(r) with a relative error of 7e-8 in r^2 P; about 1.4 ulp in
// all. Results below the smallest normal float are 0; NaN stays NaN.
template <int B>
DTF_INLINE Lanes<float, B> exp(Lanes<float, B> x) {
  using L = Lanes<float, B>;
  L bounded = min(x, L(89.f));
  L shifted = bounded * L(1.44269504f) + L(12582912.f);  // 1.5 * 2^23: rounds to an integer
  L n = shifted - L(12582912.f);
  L r = bounded - n * L(0.693359375f);  // ln 2 in two parts
  r = r + n * L(2.12194440e-4f);
  L p = ((((L(0.00139269266f) * r + L(0.00836377387f)) * r + L(0.0416665501f)) * r + L(0.166665734f)) * r + L(0.5f));
  p = p * r * r + r + L(1.f);
  // 2^n: the low bits of `shifted` hold n
  L power = map(shifted, [](auto v) DTF_LAMBDA_INLINE {
    return (typename L::Native)(((typename L::NativeMask)v - 0x4B400000 + 127) << 23);
  });
  return select(x < L(-87.3365402f), L(0.f), p * power);
}
// ln x for normal x > 0; x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), ln(1 + f) = f - f^2/2 + f^3 Q(f) with a
// relative error of 3e-8 in Q. NaN stays NaN.
template <int B>
DTF_INLINE Lanes<float, B> log(Lanes<float, B> x) {
  using L = Lanes<float, B>;
  constexpr int32_t sqrt_half = 0x3F3504F3;
  L k = map(x, [](auto v) DTF_LAMBDA_INLINE {
    return __builtin_convertvector(((typename L::NativeMask)v - sqrt_half) >> 23, typename L::Native);
  });
  L f = map(x, [](auto v) DTF_LAMBDA_INLINE {
    return (typename L::Native)((((typename L::NativeMask)v - sqrt_half) & 0x007FFFFF) + sqrt_half);
  });
  f = f - L(1.f);
  L q = L(0.0697161147f) * f + L(-0.114797338f);
  q = (((q * f + L(0.116854199f)) * f + L(-0.124256873f)) * f + L(0.142490576f)) * f + L(-0.166678023f);
  q = ((q * f + L(0.200007157f)) * f + L(-0.24999997f)) * f + L(0.333333312f);
  L result = f * f * f * q - L(0.5f) * f * f + k * L(-2.12194440e-4f) + f + k * L(0.693359375f);
  return select(x == x, result, x);
}
// double is the precision of tests and gradient checks: the C library, lane by lane
template <int B>
DTF_INLINE Lanes<double, B> exp(Lanes<double, B> x) {
  return map_lanes(x, [](double v) DTF_LAMBDA_INLINE { return __builtin_exp(v); });
}
template <int B>
DTF_INLINE Lanes<double, B> log(Lanes<double, B> x) {
  return map_lanes(x, [](double v) DTF_LAMBDA_INLINE { return __builtin_log(v); });
}

// Reductions over the lanes, always in the same order: halves, quarters, ...
template <typename T, int B, typename F>
DTF_INLINE T reduce(Lanes<T, B> x, F combine) {
  T lane[Lanes<T, B>::width];
  store(lane, x);
  for (int half = Lanes<T, B>::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = combine(lane[i], lane[i + half]);
  return lane[0];
}
template <typename T, int B>
DTF_INLINE T sum(Lanes<T, B> x) {
  return reduce(x, [](T a, T b) DTF_LAMBDA_INLINE { return a + b; });
}
template <typename T, int B>
DTF_INLINE T maximum(Lanes<T, B> x) {
  return reduce(x, [](T a, T b) DTF_LAMBDA_INLINE { return max(a, b); });
}

// ---- loads and stores, with conversion to and from half precision -------------------------------------------------

// One register's worth of float bits, and as many 16-bit halves.
template <int B>
struct BitsOf {
  using Wide [[gnu::vector_size(B)]] = uint32_t;
  using Narrow [[gnu::vector_size(B / 2)]] = uint16_t;
  using Float [[gnu::vector_size(B)]] = float;
};

template <int B>
DTF_INLINE auto widen(typename BitsOf<B>::Narrow raw, BFloat16) {
  return (typename BitsOf<B>::Float)(__builtin_convertvector(raw, typename BitsOf<B>::Wide) << 16);
}
template <int B>
DTF_INLINE auto widen(typename BitsOf<B>::Narrow raw, Half) {
  // Move exponent and mantissa into place and rescale by 2^112, which also normalises subnormals; inf and NaN keep
  // their all-ones exponent.
  using Bits = typename BitsOf<B>::Wide;
  using Float = typename BitsOf<B>::Float;
  Bits bits = __builtin_convertvector(raw, Bits);
  Bits magnitude = (bits & 0x7FFFu) << 13, sign = (bits & 0x8000u) << 16;
  Float scaled = (Float)magnitude * 0x1p112f;
  Bits special = (Bits)(magnitude >= 0x0F800000u) & 0x7F800000u;
  return (Float)((Bits)scaled | sign | special);
}
template <int B>
DTF_INLINE auto narrow(typename BitsOf<B>::Float x, BFloat16) {  // to nearest even
  using Bits = typename BitsOf<B>::Wide;
  Bits bits = (Bits)x;
  Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  Bits is_nan = (Bits)(x != x);
  return __builtin_convertvector((is_nan & 0x7FC0u) | (~is_nan & rounded), typename BitsOf<B>::Narrow);
}
template <int B>
DTF_INLINE auto narrow(typename BitsOf<B>::Float x, Half) {  // to nearest even, subnormals included
  using Bits = typename BitsOf<B>::Wide;
  using Float = typename BitsOf<B>::Float;
  Bits sign = ((Bits)x >> 16) & 0x8000u;
  Bits bits = (Bits)x & 0x7FFFFFFFu;
  // normal: rebias, round on the 13 bits that fall away
  Bits normal = (bits - 0x38000000u + 0x0FFFu + ((bits >> 13) & 1u)) >> 13;
  // subnormal: adding 1/2 lets the float addition do the rounding at 2^-24
  Bits tiny = (Bits)((Float)bits + 0.5f) - 0x3F000000u;
  Bits is_tiny = (Bits)(bits < 0x38800000u);
  Bits result = (is_tiny & tiny) | (~is_tiny & normal);
  Bits is_large = (Bits)(bits >= 0x477FF000u);  // 65520 and above round to infinity
  result = (is_large & 0x7C00u) | (~is_large & result);
  Bits is_nan = (Bits)(bits > 0x7F800000u);
  result = (is_nan & 0x7E00u) | (~is_nan & result);
  return __builtin_convertvector(result | sign, typename BitsOf<B>::Narrow);
}

template <typename L, typename T>
DTF_INLINE L load(const T* from) {
  constexpr int parts = L::parts, bytes = sizeof(typename L::Native);
  auto part = [&](int p) DTF_LAMBDA_INLINE {
    if constexpr (sizeof(T) == 2) {
      typename BitsOf<bytes>::Narrow raw;
      std::memcpy(&raw, from + p * L::part_width, sizeof raw);
      return widen<bytes>(raw, T{});
    } else {
      typename L::Native raw;
      std::memcpy(&raw, from + p * L::part_width, sizeof raw);
      return raw;
    }
  };
  L x;
  DTF_EACH_PART(x.part[p] = part(p));
  return x;
}
template <typename L, typename T>
DTF_INLINE void store(T* to, L x) {
  constexpr int parts = L::parts, bytes = sizeof(typename L::Native);
  auto raw = [&](int p) DTF_LAMBDA_INLINE {
    if constexpr (sizeof(T) == 2)
      return narrow<bytes>(x.part[p], T{});
    else
      return x.part[p];
  };
  auto store_part = [&](int p) DTF_LAMBDA_INLINE {
    auto part = raw(p);
    std::memcpy(to + p * L::part_width, &part, sizeof part);
  };
  DTF_EACH_PART(store_part(p));
}

// memcpy of fewer than 16 elements: a call or a string instruction would cost more than the arithmetic on a row's tail.
template <typename T>
DTF_INLINE void copy_few(T* to, const T* from, int64_t count) {
  auto piece = [&](auto size) DTF_LAMBDA_INLINE {
    if ((count & size) == 0) return;
    std::memcpy(to, from, size * sizeof(T));
    to += size, from += size;
  };
  piece(std::integral_constant<int, 8>{});
  piece(std::integral_constant<int, 4>{});
  piece(std::integral_constant<int, 2>{});
  piece(std::integral_constant<int, 1>{});
}
// The first `count` lanes; the others are `fill` when loaded and not written when stored.
template <typename L, typename T>
DTF_INLINE L load_part(const T* from, int64_t count, Compute<T> fill) {
  if (count == L::width) return load<L>(from);
  T raw[L::width];
  store(raw, L(fill));
  copy_few(raw, from, count);
  return load<L>(raw);
}
template <typename L, typename T>
DTF_INLINE void store_part(T* to, L x, int64_t count) {
  if (count == L::width) return store(to, x);
  T raw[L::width];
  store(raw, x);
  copy_few(to, raw, count);
}

// Calls step(i, part) for each full vector of [begin, end) and once for the tail. part.load(pointer, fill) and
// part.store(pointer, value) then work on the right number of elements, so that one body serves both.
template <typename L>
struct Whole {
  template <typename T>
  DTF_INLINE L load(const T* from, Compute<T>) const {
    return dtf::load<L>(from);
  }
  template <typename T>
  DTF_INLINE void store(T* to, L x) const {
    dtf::store(to, x);
  }
};
template <typename L>
struct Part {
  int64_t count;
  template <typename T>
  DTF_INLINE L load(const T* from, Compute<T> fill) const {
    return load_part<L>(from, count, fill);
  }
  template <typename T>
  DTF_INLINE void store(T* to, L x) const {
    store_part(to, x, count);
  }
};
template <typename L, typename Step>
DTF_INLINE void for_lanes(int64_t begin, int64_t end, Step step) {
  int64_t i = begin;
  for (; i + L::width <= end; i += L::width) step(i, Whole<L>{});
  if (i < end) step(i, Part<L>{end - i});
}

}  // namespace dtf
