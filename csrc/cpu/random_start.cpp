#include <memory>

#include "pixels.h"
#include "reduce.h"

namespace dtf {
namespace {

// Sixteen Philox counters at a time: the words of sixteen consecutive blocks.
struct Words {
  Bits v;
};
DTF_INLINE Words operator^(Words a, Words b) { return {a.v ^ b.v}; }
DTF_INLINE Words operator^(Words a, uint32_t b) { return {a.v ^ b}; }
DTF_INLINE Words operator*(Words a, uint32_t b) { return {a.v * b}; }
DTF_INLINE Words mulhi(Words a, uint32_t b) {
  Words high;
  for (int i = 0; i < 16; ++i) high.v[i] = static_cast<uint32_t>((static_cast<uint64_t>(a.v[i]) * b) >> 32);
  return high;
}

constexpr int64_t kBlocks = 16, kWords = 4 * kBlocks;

// The upper 24 bits of words 64 group .. 64 group + 63 of a sample's stream, in order.
template <typename A>
DTF_INLINE void draw(A (&bits24)[kWords], int64_t group, uint32_t kind, int64_t index, uint64_t key) {
  Words c[4];
  for (int i = 0; i < kBlocks; ++i) c[0].v[i] = static_cast<uint32_t>(group * kBlocks + i);
  c[1].v = Bits{} + kind;
  c[2].v = Bits{} + static_cast<uint32_t>(index);
  c[3].v = Bits{} + static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32);
  philox(c, {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)});
  for (int i = 0; i < kBlocks; ++i)
    for (int w = 0; w < 4; ++w) bits24[4 * i + w] = static_cast<A>(c[w].v[i] >> 8);
}

// 64 standard normals from 64 words: words 2j and 2j + 1 give normals 2j and 2j + 1.
template <typename A>
DTF_INLINE void to_normals(A (&values)[kWords]) {
  using L = Lanes<A>;
  A first[kWords / 2], second[kWords / 2];
  for (int i = 0; i < kWords / 2; ++i) first[i] = values[2 * i], second[i] = values[2 * i + 1];
  for (int i = 0; i < kWords / 2; i += L::width) {
    Pair<L> pair = normals(load(first + i), load(second + i));
    store(first + i, pair.first);
    store(second + i, pair.second);
  }
  for (int i = 0; i < kWords / 2; ++i) values[2 * i] = first[i], values[2 * i + 1] = second[i];
}

// Calls step(i, 64 values, part) for every vector of a sample, in order.
template <typename A, typename Step>
DTF_INLINE void for_draws(int64_t size, bool normal, int64_t index, uint64_t key, Step step) {
  for (int64_t group = 0; group * kWords < size; ++group) {
    A values[kWords];
    draw(values, group, 0, index, key);
    if (normal) to_normals(values);
    int64_t first = group * kWords, count = size - first < kWords ? size - first : kWords;
    for_lanes<A>(0, count, [&](int64_t i, auto part) DTF_LAMBDA_INLINE { step(first + i, load(values + i), part); });
  }
}

template <typename T>
DTF_INLINE void start(const RandomStart<T>& k, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using L = Lanes<A>;
  using Kind = typename RandomStart<T>::Kind;
  const L lower(k.lower), upper(k.upper);
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* clean = k.clean + sample * k.size;
    T* out = k.start + sample * k.size;
    const int64_t index = k.index[sample];
    if (k.kind == Kind::linf) {
      const L radius(k.radius);
      for_draws<A>(k.size, false, index, k.key, [&](int64_t i, L bits, auto part) DTF_LAMBDA_INLINE {
        part.store(out + i, clamp(part.load(clean + i, A(0)) + radius * uniform_symmetric(bits), lower, upper));
      });
    } else if (k.kind == Kind::gaussian) {
      const L radius(k.radius);
      for_draws<A>(k.size, true, index, k.key, [&](int64_t i, L normal, auto part) DTF_LAMBDA_INLINE {
        part.store(out + i, part.load(clean + i, A(0)) + radius * normal);
      });
    } else {
      SumOfSquares squares;
      std::unique_ptr<A[]> direction(new A[k.size]);
      for_draws<A>(k.size, true, index, k.key, [&](int64_t i, L normal, auto part) DTF_LAMBDA_INLINE {
        part.store(direction.get() + i, normal);
        squares.add(part.load(direction.get() + i, A(0)));  // without the lanes beyond the tail
      });
      A radial[kWords];
      draw(radial, 0, 1, index, k.key);
      const A norm = static_cast<A>(squares.norm());
      const L scale(l2_start_scale(A(k.radius), uniform_positive(radial[0]), static_cast<A>(k.size), norm));
      for_lanes<A>(0, k.size, [&](int64_t i, auto part) DTF_LAMBDA_INLINE {
        L moved = part.load(clean + i, A(0)) + part.load(direction.get() + i, A(0)) * scale;
        part.store(out + i, clamp(moved, lower, upper));
      });
    }
  }
}

}  // namespace

DTF_DEFINE_KERNEL(RandomStart, start)

}  // namespace dtf
