// Rows of logits [N, C] in vector lanes.
//
// Few classes (C <= 128): a lane is a row. A block of rows is transposed into class-major order, then every operation
// on class c works on all rows of the block. Many classes: a lane is a class, and a row is a loop over vectors. Either
// way a row's arithmetic does not depend on the rows around it.
#pragma once

#include <algorithm>
#include <array>

#include "simd.h"

namespace dtf {

constexpr int64_t kMaxClassesLaneIsRow = 128;

// Lanes index... of the concatenation of a and b.
#if defined(__clang__) || __GNUC__ >= 12
#define DTF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC 11 has no such builtin
#define DTF_SHUFFLE(a, b, ...) shuffle_lanes<__VA_ARGS__>(a, b)
template <int... index, typename Native>
DTF_INLINE auto shuffle_lanes(Native a, Native b) {
  using Result [[gnu::vector_size(sizeof...(index) * sizeof(a[0]))]] = float;
  if constexpr (sizeof(Result) == sizeof(Native)) {
    using Index [[gnu::vector_size(sizeof(Native))]] = int32_t;
    return __builtin_shuffle(a, b, Index{index...});
  } else {
    constexpr int lanes = sizeof(Native) / sizeof(a[0]);
    return Result{(index < lanes ? a[index % lanes] : b[index % lanes])...};
  }
}
#endif

// Transposes 4x4 floats within each 16 bytes of four registers.
template <typename Native, int... I>
DTF_INLINE void transpose_4x4(Native (&r)[4], std::integer_sequence<int, I...>) {
  constexpr int width = sizeof...(I);
  // lane I of the result: from the first register where I is even, from the second where it is odd
  Native low01 = DTF_SHUFFLE(r[0], r[1], (I / 4 * 4 + I % 4 / 2 + I % 2 * width)...);
  Native low23 = DTF_SHUFFLE(r[2], r[3], (I / 4 * 4 + I % 4 / 2 + I % 2 * width)...);
  Native high01 = DTF_SHUFFLE(r[0], r[1], (I / 4 * 4 + I % 4 / 2 + I % 2 * width + 2)...);
  Native high23 = DTF_SHUFFLE(r[2], r[3], (I / 4 * 4 + I % 4 / 2 + I % 2 * width + 2)...);
  // the first or the second half of each 16 bytes, from both registers
  r[0] = DTF_SHUFFLE(low01, low23, (I / 4 * 4 + I % 2 + I % 4 / 2 * width)...);
  r[1] = DTF_SHUFFLE(low01, low23, (I / 4 * 4 + I % 2 + I % 4 / 2 * width + 2)...);
  r[2] = DTF_SHUFFLE(high01, high23, (I / 4 * 4 + I % 2 + I % 4 / 2 * width)...);
  r[3] = DTF_SHUFFLE(high01, high23, (I / 4 * 4 + I % 2 + I % 4 / 2 * width + 2)...);
}

// Four floats from each of `fours` addresses, side by side in one register; and back.
using Four [[gnu::vector_size(16)]] = float;
template <int fours, typename Address>
DTF_INLINE auto gather(Address address) {
  if constexpr (fours == 1) {
    Four x;
    std::memcpy(&x, address(0), sizeof x);
    return x;
  } else if constexpr (fours == 2) {
    return DTF_SHUFFLE(gather<1>(address), gather<1>([&](int j) DTF_LAMBDA_INLINE { return address(j + 1); }), 0, 1, 2,
                       3, 4, 5, 6, 7);
  } else {
    return DTF_SHUFFLE(gather<2>(address), gather<2>([&](int j) DTF_LAMBDA_INLINE { return address(j + 2); }), 0, 1, 2,
                       3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
}

template <typename Native, typename Put>
DTF_INLINE void scatter(Native x, Put put) {
  if constexpr (sizeof(Native) == 16) {
    put(0, x);
  } else {
    put(0, DTF_SHUFFLE(x, x, 0, 1, 2, 3));
    put(1, DTF_SHUFFLE(x, x, 4, 5, 6, 7));
    if constexpr (sizeof(Native) == 64) {
      put(2, DTF_SHUFFLE(x, x, 8, 9, 10, 11));
      put(3, DTF_SHUFFLE(x, x, 12, 13, 14, 15));
    }
  }
}

// A block of up to `width` rows, as L: Lanes of the type that they are computed in.
template <typename T, typename L>
struct RowBlock {
  using A = typename L::Scalar;
  alignas(64) A values[kMaxClassesLaneIsRow * L::width];  // [C][width]

  DTF_INLINE L operator[](int64_t c) const { return load<L>(values + c * L::width); }
  DTF_INLINE void set(int64_t c, L x) { store(values + c * L::width, x); }

  // Reads `count` rows; the lanes beyond them repeat the last one and their results are not written.
  DTF_INLINE void read(const T* rows, int64_t count, int64_t classes) {
    if constexpr (std::is_same_v<T, A>) {
      transpose(rows, count, classes);
    } else {
      alignas(64) A wide[kMaxClassesLaneIsRow * L::width];
      for_lanes<L>(0, count * classes,
                   [&](int64_t i, auto part) DTF_LAMBDA_INLINE { part.store(wide + i, part.load(rows + i, A(0))); });
      transpose(wide, count, classes);
    }
  }
  DTF_INLINE void write(T* rows, int64_t count, int64_t classes) const {
    if constexpr (std::is_same_v<T, A>) {
      transpose_back(rows, count, classes);
    } else {
      alignas(64) A wide[kMaxClassesLaneIsRow * L::width];
      transpose_back(wide, count, classes);
      for_lanes<L>(0, count * classes,
                   [&](int64_t i, auto part) DTF_LAMBDA_INLINE { part.store(rows + i, part.load(wide + i, A(0))); });
    }
  }

 private:
  using Native = typename L::Native;
  // 16 bytes of a row: four classes. Register i holds those of rows i, i + 4, i + 8, ...
  static constexpr int parts = L::parts, fours = L::part_width / 4;
  using Indices = std::make_integer_sequence<int, L::part_width>;
  static constexpr bool by_four = std::is_same_v<A, float>;

  DTF_INLINE void transpose(const A* rows, int64_t count, int64_t classes) {
    auto offset = [&](int64_t i) DTF_LAMBDA_INLINE { return (i < count ? i : count - 1) * classes; };
    if constexpr (by_four) {
      if (classes >= 4 && count == L::width)
        return transpose_fours(rows, [&](int64_t i) DTF_LAMBDA_INLINE { return i * classes; }, classes);
      if (classes >= 4) return transpose_fours(rows, offset, classes);
    }
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t i = 0; i < L::width; ++i) values[c * L::width + i] = rows[offset(i) + c];
  }
  // Four classes at a time; the last four may overlap the ones before.
  template <typename Offset>
  DTF_INLINE void transpose_fours(const A* rows, Offset offset, int64_t classes) {
    for (int64_t next = 0; next < classes; next += 4) {
      const int64_t c = next + 4 <= classes ? next : classes - 4;
      auto transpose_part = [&](int p) DTF_LAMBDA_INLINE {
        Native r[4];
        for (int i = 0; i < 4; ++i)
          r[i] =
              gather<fours>([&](int j) DTF_LAMBDA_INLINE { return rows + offset(p * L::part_width + 4 * j + i) + c; });
        transpose_4x4(r, Indices{});
        for (int i = 0; i < 4; ++i) std::memcpy(values + (c + i) * L::width + p * L::part_width, &r[i], sizeof(Native));
      };
      DTF_EACH_PART(transpose_part(p));
    }
  }
  DTF_INLINE void transpose_back(A* rows, int64_t count, int64_t classes) const {
    if constexpr (by_four) {
      if (classes >= 4 && count == L::width) return transpose_fours_back(rows, L::width, classes);
      if (classes >= 4) return transpose_fours_back(rows, count, classes);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < classes; ++c) rows[i * classes + c] = values[c * L::width + i];
  }
  DTF_INLINE void transpose_fours_back(A* rows, int64_t count, int64_t classes) const {
    for (int64_t next = 0; next < classes; next += 4) {
      const int64_t c = next + 4 <= classes ? next : classes - 4;
      auto transpose_part = [&](int p) DTF_LAMBDA_INLINE {
        Native r[4];
        for (int i = 0; i < 4; ++i) std::memcpy(&r[i], values + (c + i) * L::width + p * L::part_width, sizeof(Native));
        transpose_4x4(r, Indices{});
        for (int i = 0; i < 4; ++i)
          scatter(r[i], [&](int j, Four x) DTF_LAMBDA_INLINE {
            const int64_t row = p * L::part_width + 4 * j + i;
            if (row < count) std::memcpy(rows + row * classes + c, &x, sizeof x);
          });
      };
      DTF_EACH_PART(transpose_part(p));
    }
  }
};

// Maximum over the classes of each row of the block.
template <typename T, typename L>
DTF_INLINE L row_maximum(const RowBlock<T, L>& block, int64_t classes) {
  L m = block[0];
  for (int64_t c = 1; c < classes; ++c) m = max(m, block[c]);
  return m;
}
// The labels of a block of rows. A class's number is exact in a lane, too.
template <typename L>
struct BlockLabels {
  using A = typename L::Scalar;
  L index, missing;  // missing: -inf, or NaN where the label is no class

  DTF_INLINE BlockLabels(const int64_t* labels, int64_t count, int64_t classes) {
    constexpr A nothing = -std::numeric_limits<A>::infinity(), nan = std::numeric_limits<A>::quiet_NaN();
    alignas(64) A numbers[L::width], starts[L::width];
    for (int64_t i = 0; i < L::width; ++i) {
      const int64_t label = labels[i < count ? i : count - 1];
      numbers[i] = static_cast<A>(label);
      starts[i] = is_class(label, classes) ? nothing : nan;
    }
    index = load<L>(numbers), missing = load<L>(starts);
  }
  // 1 where `number` is the label's, else 0
  DTF_INLINE L is(L number) const { return select(index == number, L(1), L(0)); }
};
// Calls step(c, number) for each class, `number` being c in all lanes.
template <typename L, typename Step>
DTF_INLINE void for_classes(int64_t classes, Step step) {
  L number(0);
  for (int64_t c = 0; c < classes; ++c) {
    step(c, number);
    number = number + L(1);
  }
}

// Asks for a part of the next long row while this one is computed: its maximum, which is memory-bound, then runs from
// the cache. Beyond the last row it does nothing.
DTF_INLINE void prefetch(const void* address) { __builtin_prefetch(address); }

// 1 in the lane of class `index`, if it is among the lanes from class c on.
template <typename L>
DTF_INLINE L one_at(int64_t index, int64_t c) {
  constexpr int width = L::width;
  using Window = std::array<typename L::Scalar, 2 * width + 1>;
  static constexpr Window window = [] {
    Window zeros{};
    zeros[width] = 1;
    return zeros;
  }();
  return load<L>(window.data() + width - std::clamp<int64_t>(index - c, -1, width));
}

// Maximum of one long row.
template <typename L, typename T>
DTF_INLINE Compute<T> row_maximum(const T* row, int64_t classes) {
  using A = Compute<T>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  L m(lowest);
  for_lanes<L>(0, classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE { m = max(m, part.load(row + c, lowest)); });
  return maximum(m);
}

// Runs lane_is_row(first, count) over blocks of rows, or lane_is_class(row) over rows, whichever suits C.
template <typename L, typename Block, typename Row>
DTF_INLINE void for_rows(int64_t begin, int64_t end, int64_t classes, Block lane_is_row, Row lane_is_class) {
  if (classes <= kMaxClassesLaneIsRow) {
    for (int64_t first = begin; first < end; first += L::width)
      lane_is_row(first, end - first < L::width ? end - first : L::width);
  } else {
    for (int64_t row = begin; row < end; ++row) lane_is_class(row);
  }
}

}  // namespace dtf
