// The other side of csrc/cuda/gpu_compat.cuh: what kernels use, in terms of the emulator's scheduler.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "scheduler.h"

#define DTF_KERNEL(max_threads) void
#define DTF_ROW_KERNEL(T, Shape) void
#define DTF_DEVICE inline
#define DTF_UNROLL

// As in CUDA, a shared array belongs to the function that declares it: each instantiation of a template has its own.
#define DTF_SHARED(type, name, count)    \
  static const char name##_identity = 0; \
  type* name = static_cast<type*>(dtf::simt::shared_array(&name##_identity, sizeof(type) * (count)))
#define DTF_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(dtf::simt::dynamic_shared_array())

using dtf::simt::blockDim;
using dtf::simt::blockIdx;
using dtf::simt::gridDim;
using dtf::simt::threadIdx;

// Knows the line that it is called from, so that threads that wait in different lines are told apart.
inline void __syncthreads(int line = __builtin_LINE()) { dtf::simt::barrier(line); }

namespace dtf {

struct alignas(16) Bits128 {
  uint32_t word[4];
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float widen(Half x) {
  const uint32_t size = x.bits & 0x7FFF;
  const float magnitude = size < 0x0400   ? static_cast<float>(size) * 0x1p-24f  // subnormal
                          : size < 0x7C00 ? std::bit_cast<float>((size << 13) + (112 << 23))
                                          : std::bit_cast<float>((size << 13) | 0x7F800000);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

// To nearest even: half of the last kept bit, less the smallest step where that bit is even, carries into it or not.
inline uint32_t round_off(uint32_t bits, int dropped) {
  return (bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1)) >> dropped;
}
inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, BFloat16& to) {
  to.bits = static_cast<uint16_t>(x != x ? 0x7FFF : round_off(std::bit_cast<uint32_t>(x), 16));
}
inline void narrow(float x, Half& to) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  const float magnitude = std::abs(x);
  const uint32_t rounded = magnitude < 0x1p-14f ? static_cast<uint32_t>(std::lrint(magnitude * 0x1p24f))  // subnormal
                                                : std::min(round_off(size, 13) - (112u << 10), 0x7C00u);
  to.bits = static_cast<uint16_t>(x != x ? 0x7FFF : sign | rounded);
}

inline void store128(void* to, const Bits128& x) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof x != 0) simt::fail("a misaligned store of 16 bytes");
  *static_cast<Bits128*>(to) = x;
}

template <typename V>
inline V shuffle_xor(V x, int mask) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = simt::exchange(bits, mask);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename... Arguments>
void start(void (*kernel)(Arguments...), const Geometry& geometry, void*, Arguments... arguments) {
  auto bytes = [](const auto& x) { return std::string(reinterpret_cast<const char*>(&x), sizeof x); };
  simt::launch({reinterpret_cast<const void*>(kernel), geometry, {bytes(arguments)...}}, [&] { kernel(arguments...); });
}
inline int last_error() { return 0; }

}  // namespace dtf
