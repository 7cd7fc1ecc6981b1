// What a kernel may use, the same on a GPU and in the tests' CPU emulator. Nothing else in cuda/ has an #ifdef.
//
// Kernels are written so that both sides, and the analysis of the compiled code, can follow them: shared arrays and
// launches through the names below; no return before a barrier or a shuffle; every shuffle with all 32 lanes; memory
// addresses, branches around memory and barriers never depend on data that was loaded; no atomics; 64-bit indices.
#pragma once

#include <cstdint>

#include "../arguments.h"
#include "../math.h"

namespace dtf {

struct Geometry {
  int64_t grid_x, grid_y;  // blocks
  int block;               // threads
  int64_t shared_bytes;    // dynamic shared memory
};

}  // namespace dtf

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DTF_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads, (max_threads) < 1024 ? 0 : 1)
// With a thread's share of a row in registers: up to 128 of them, 256 with doubles, of the 65,536 of a multiprocessor.
// Unless told how many blocks are to find theirs, the compiler takes more in one kernel and spills in the next.
#define DTF_ROW_KERNEL(T, Shape)                    \
  __global__ void __launch_bounds__(Shape::threads, \
                                    65536 / (Shape::threads * (sizeof(dtf::Compute<T>) < 8 ? 128 : 256)))
#define DTF_DEVICE __device__ __forceinline__
#define DTF_SHARED(type, name, count) __shared__ type name[count]
#define DTF_DYNAMIC_SHARED(type, name)           \
  extern __shared__ dtf::Bits128 dtf_dynamic_[]; \
  type* name = reinterpret_cast<type*>(dtf_dynamic_)
#define DTF_UNROLL _Pragma("unroll")

namespace dtf {

struct alignas(16) Bits128 {
  uint32_t word[4];
};

DTF_DEVICE float widen(float x) { return x; }
DTF_DEVICE double widen(double x) { return x; }
DTF_DEVICE float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
DTF_DEVICE float widen(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

DTF_DEVICE void narrow(float x, float& to) { to = x; }
DTF_DEVICE void narrow(double x, double& to) { to = x; }
DTF_DEVICE void narrow(float x, Half& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }
DTF_DEVICE void narrow(float x, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// One access of 16 bytes in global memory. As an instruction, since the compiler takes a plain assignment apart where
// the same bytes are written one by one in another branch.
DTF_DEVICE void store128(void* to, const Bits128& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.word[0]),
               "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
               : "memory");
}

// The value of the lane whose number differs in the bits of `mask`.
template <typename V>
DTF_DEVICE V shuffle_xor(V x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}

template <typename... Arguments>
void start(void (*kernel)(Arguments...), const Geometry& geometry, void* stream, Arguments... arguments) {
  const dim3 grid(static_cast<unsigned>(geometry.grid_x), static_cast<unsigned>(geometry.grid_y));
  kernel<<<grid, geometry.block, geometry.shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
}
inline int last_error() { return cudaGetLastError(); }

}  // namespace dtf

#else

#include "simt.h"  // tests/simt

#endif
