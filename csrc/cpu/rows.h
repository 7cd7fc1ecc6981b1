// Rows of logits [N, C] in vector lanes.
//
// Few classes (C <= 64): a lane is a row. A block of rows is transposed into class-major order, then every operation on
// class c works on all rows of the block. Many classes: a lane is a class, and a row is a loop over vectors.
// Either way a row's arithmetic does not depend on the rows around it.
#pragma once

#include "simd.h"

namespace dtf {

constexpr int64_t kMaxClassesLaneIsRow = 64;

template <typename T>
struct RowBlock {
  using A = Compute<T>;
  using L = Lanes<A>;
  A values[kMaxClassesLaneIsRow * L::width];  // [C][width]

  DTF_INLINE L operator[](int64_t c) const { return load(values + c * L::width); }
  DTF_INLINE void set(int64_t c, L x) { store(values + c * L::width, x); }

  // Reads `count` rows; the lanes beyond them are 0 and their results are not written.
  DTF_INLINE void read(const T* rows, int64_t count, int64_t classes) {
    if constexpr (std::is_same_v<T, A>) {
      transpose(rows, count, classes);
    } else {
      A wide[kMaxClassesLaneIsRow * L::width];
      for_lanes<A>(0, count * classes,
                   [&](int64_t i, auto part) DTF_LAMBDA_INLINE { part.store(wide + i, part.load(rows + i, A(0))); });
      transpose(wide, count, classes);
    }
  }
  DTF_INLINE void write(T* rows, int64_t count, int64_t classes) const {
    if constexpr (std::is_same_v<T, A>) {
      transpose_back(rows, count, classes);
    } else {
      A wide[kMaxClassesLaneIsRow * L::width];
      transpose_back(wide, count, classes);
      for_lanes<A>(0, count * classes,
                   [&](int64_t i, auto part) DTF_LAMBDA_INLINE { part.store(rows + i, part.load(wide + i, A(0))); });
    }
  }

 private:
  DTF_INLINE void transpose(const A* rows, int64_t count, int64_t classes) {
    if (count == L::width) {
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t i = 0; i < L::width; ++i) values[c * L::width + i] = rows[i * classes + c];
    } else {
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t i = 0; i < L::width; ++i) values[c * L::width + i] = i < count ? rows[i * classes + c] : A(0);
    }
  }
  DTF_INLINE void transpose_back(A* rows, int64_t count, int64_t classes) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < classes; ++c) rows[i * classes + c] = values[c * L::width + i];
  }
};

// Maximum over the classes of each row of the block.
template <typename T>
DTF_INLINE Lanes<Compute<T>> row_maximum(const RowBlock<T>& block, int64_t classes) {
  Lanes<Compute<T>> m = block[0];
  for (int64_t c = 1; c < classes; ++c) m = max(m, block[c]);
  return m;
}
// Maximum of one long row.
template <typename T>
DTF_INLINE Compute<T> row_maximum(const T* row, int64_t classes) {
  using A = Compute<T>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  Lanes<A> m(lowest);
  for_lanes<A>(0, classes, [&](int64_t c, auto part) DTF_LAMBDA_INLINE { m = max(m, part.load(row + c, lowest)); });
  return maximum(m);
}

// Runs lane_is_row(first, count) over blocks of rows, or lane_is_class(row) over rows, whichever suits C.
template <typename A, typename Block, typename Row>
DTF_INLINE void for_rows(int64_t begin, int64_t end, int64_t classes, Block lane_is_row, Row lane_is_class) {
  constexpr int64_t width = Lanes<A>::width;
  if (classes <= kMaxClassesLaneIsRow) {
    for (int64_t first = begin; first < end; first += width)
      lane_is_row(first, end - first < width ? end - first : width);
  } else {
    for (int64_t row = begin; row < end; ++row) lane_is_class(row);
  }
}

}  // namespace dtf
