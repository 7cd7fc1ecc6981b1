// Without contraction of a * b + c the linf start has the bits of the twin and of the CUDA kernel.
#pragma GCC optimize("fp-contract=off")

#include <memory>

#include "kernels.h"
#include "reduce.h"
#include "rows.h"

namespace dtf {
namespace {

constexpr int64_t kBlocks = 16, kWords = 4 * kBlocks;

// One of the four words of sixteen Philox counters.
template <int Bytes>
struct Words {
  static constexpr int parts = 64 / Bytes;
  typename BitsOf<Bytes>::Wide part[parts];

  Words() = default;
  DTF_INLINE explicit Words(uint32_t word) { DTF_EACH_PART(part[p] = word - typename BitsOf<Bytes>::Wide{}); }
};
template <int B>
DTF_INLINE Words<B> operator^(Words<B> a, Words<B> b) {
  constexpr int parts = Words<B>::parts;
  DTF_EACH_PART(a.part[p] = a.part[p] ^ b.part[p]);
  return a;
}
template <int B>
DTF_INLINE Words<B> operator^(Words<B> a, uint32_t b) {
  return a ^ Words<B>(b);
}
template <int B>
DTF_INLINE Words<B> operator*(Words<B> a, uint32_t b) {
  constexpr int parts = Words<B>::parts;
  DTF_EACH_PART(a.part[p] = a.part[p] * b);
  return a;
}
template <int B>
DTF_INLINE Words<B> mulhi(Words<B> a, uint32_t b) {
  uint32_t lane[kBlocks];
  std::memcpy(lane, a.part, sizeof lane);
#pragma GCC unroll 1  // unrolled, it would not become vector code
  for (int i = 0; i < kBlocks; ++i) lane[i] = dtf::mulhi(lane[i], b);
  std::memcpy(a.part, lane, sizeof lane);
  return a;
}

// The upper 24 bits of words 64 group .. 64 group + 63 of a sample's stream, in order; or the standard normals that
// they make, words 2j and 2j + 1 giving normals 2j and 2j + 1.
template <int Bytes, typename A>
DTF_INLINE void draw(A (&values)[kWords], int64_t group, uint32_t kind, int64_t index, uint64_t key, bool normal) {
  using L = Lanes<A, Bytes>;
  uint32_t block[kBlocks];
  for (int i = 0; i < kBlocks; ++i) block[i] = static_cast<uint32_t>(group * kBlocks + i);
  Words<Bytes> c[4], blocks;
  std::memcpy(blocks.part, block, sizeof block);
  random_words(c, blocks, kind, index, key);
  alignas(64) A words[4][kBlocks];
  for (int w = 0; w < 4; ++w) {
    std::memcpy(block, c[w].part, sizeof block);
    for (int i = 0; i < kBlocks; ++i) words[w][i] = static_cast<A>(static_cast<int32_t>(block[i] >> 8));
  }
  if (normal) {
    for (int w = 0; w < 4; w += 2)
      for (int i = 0; i < kBlocks; i += L::width) {
        Pair<L> pair = normals(load<L>(words[w] + i), load<L>(words[w + 1] + i));
        store(words[w] + i, pair.first);
        store(words[w + 1] + i, pair.second);
      }
  }
  if constexpr (L::width == kBlocks) {
    RowBlock<A, L> rows;
    for (int w = 0; w < 4; ++w) rows.set(w, load<L>(words[w]));
    rows.write(values, kBlocks, 4);
  } else {
    for (int i = 0; i < kBlocks; ++i)
      for (int w = 0; w < 4; ++w) values[4 * i + w] = words[w][i];
  }
}

// Calls step(i, 64 values, part) for every vector of a sample, in order.
template <typename L, int Bytes, typename Step>
DTF_INLINE void for_draws(int64_t size, bool normal, int64_t index, uint64_t key, Step step) {
  for (int64_t group = 0; group * kWords < size; ++group) {
    typename L::Scalar values[kWords];
    draw<Bytes>(values, group, 0, index, key, normal);
    int64_t first = group * kWords, count = size - first < kWords ? size - first : kWords;
    for_lanes<L>(0, count, [&](int64_t i, auto part) DTF_LAMBDA_INLINE { step(first + i, load<L>(values + i), part); });
  }
}

template <int Bytes, typename T>
DTF_INLINE void start(const RandomStart<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using L = Lanes<A, Bytes>;
  const L lower(k.lower), upper(k.upper);
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* clean = k.clean + sample * k.size;
    T* out = k.start + sample * k.size;
    const int64_t index = k.index[sample];
    if (k.kind == StartKind::linf) {
      const L radius(k.radius);
      for_draws<L, Bytes>(k.size, false, index, k.key, [&](int64_t i, L bits, auto part) DTF_LAMBDA_INLINE {
        part.store(out + i, clamp(part.load(clean + i, A(0)) + radius * uniform_symmetric(bits), lower, upper));
      });
    } else if (k.kind == StartKind::gaussian) {
      const L radius(k.radius);
      for_draws<L, Bytes>(k.size, true, index, k.key, [&](int64_t i, L normal, auto part) DTF_LAMBDA_INLINE {
        part.store(out + i, part.load(clean + i, A(0)) + radius * normal);
      });
    } else {
      SumOfSquares<Bytes> squares;
      std::unique_ptr<A[]> direction(new A[k.size]);
      for_draws<L, Bytes>(k.size, true, index, k.key, [&](int64_t i, L normal, auto part) DTF_LAMBDA_INLINE {
        part.store(direction.get() + i, normal);
        squares.add(part.load(direction.get() + i, A(0)));  // without the lanes beyond the tail
      });
      A radial[kWords];
      draw<Bytes>(radial, 0, 1, index, k.key, false);
      const A norm = static_cast<A>(squares.norm());
      const L scale(l2_start_scale(A(k.radius), uniform_positive(radial[0]), static_cast<A>(k.size), norm));
      for_lanes<L>(0, k.size, [&](int64_t i, auto part) DTF_LAMBDA_INLINE {
        L moved = part.load(clean + i, A(0)) + part.load(direction.get() + i, A(0)) * scale;
        part.store(out + i, clamp(moved, lower, upper));
      });
    }
  }
}

}  // namespace

// GCC makes poor AVX-512 code of mulhi: with AVX2 this is 1.4 times faster on the same machine.
DTF_DEFINE_KERNEL_UP_TO(Level::v3, RandomStart, start)

}  // namespace dtf
