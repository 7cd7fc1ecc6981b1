// Rows of logits [N, C]: how threads share them.
#pragma once

#include "reduce.cuh"

namespace dtf {

// `lanes` neighbouring threads share a row: lane l has the classes l, l + lanes, l + 2 lanes, ... They keep `items` of
// them in registers, so that the row is read once, or none and read it anew in each pass (items = 0).
template <int lanes_, int items_>
struct RowShape {
  static constexpr int lanes = lanes_, items = items_;
  static constexpr int threads = lanes < 128 ? 128 : lanes;
  static constexpr int rows_per_block = threads / lanes;
  static constexpr int64_t max_classes = items > 0 ? lanes * items : INT32_MAX;
};
using NarrowRow = RowShape<8, 4>;  // 16 rows a block: a warp for 10 classes would idle
using WarpRow = RowShape<32, 8>;
using WideRow = RowShape<32, 32>;
using BlockRow = RowShape<256, 0>;

// Calls f(Shape{}) with the shape for this number of classes.
template <typename F>
void with_row_shape(int64_t classes, F f) {
  if (classes <= NarrowRow::max_classes) return f(NarrowRow{});
  if (classes <= WarpRow::max_classes) return f(WarpRow{});
  if (classes <= WideRow::max_classes) return f(WideRow{});
  f(BlockRow{});
}
// The same for kernels that only walk over the classes: as many lanes, nothing kept in registers.
template <typename F>
void with_row_lanes(int64_t classes, F f) {
  if (classes <= NarrowRow::max_classes) return f(RowShape<NarrowRow::lanes, 0>{});
  if (classes <= WideRow::max_classes) return f(RowShape<WideRow::lanes, 0>{});
  f(BlockRow{});
}
// Queues a kernel over rows, in the shape that suits.
template <typename Shape, typename Arguments>
void start_rows(Shape, void (*kernel)(Arguments, int64_t), const Arguments& k, int64_t rows, const Queue& queue) {
  start(kernel, Geometry{grid_for(rows, Shape::rows_per_block, queue), 1, Shape::threads, 0}, queue.stream, k, rows);
}

// Calls body(row, valid) for this thread's rows. All threads of the block come along, beyond the last row with valid =
// false, since they take part in shuffles and barriers.
template <typename Shape, typename Body>
DTF_DEVICE void for_rows(int64_t rows, Body body) {
  const int group = threadIdx.x / Shape::lanes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * Shape::rows_per_block;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * Shape::rows_per_block; first < rows; first += stride)
    body(first + group, first + group < rows);
}
template <typename Shape>
DTF_DEVICE int row_lane() {
  return threadIdx.x % Shape::lanes;
}

// Calls f(c, item) for this lane's classes; with registers also for c beyond the last class, up to a full item.
template <typename Shape, typename F>
DTF_DEVICE void for_classes(int classes, F f) {
  if constexpr (Shape::items > 0) {
    DTF_UNROLL for (int item = 0; item < Shape::items; ++item) if (item * Shape::lanes < classes)
        f(row_lane<Shape>() + item * Shape::lanes, item);
  } else {
    for (int c = row_lane<Shape>(); c < classes; c += Shape::lanes) f(c, 0);
  }
}

// This lane's share of one row. Beyond the last class, and in rows that are not valid, it holds -inf: exp(-inf) = 0
// counts nothing.
template <typename T, typename Shape>
struct Row {
  using A = Compute<T>;
  const T* source;
  int classes;
  A value[Shape::items > 0 ? Shape::items : 1];

  DTF_DEVICE Row(const T* matrix, int64_t row, int classes, bool valid) : classes(classes) {
    source = matrix + row * classes;
    if constexpr (Shape::items > 0) {
      const int last = valid ? classes : 0;
      for_classes<Shape>(classes, [&](int c, int item) { value[item] = c < last ? widen(source[c]) : A(-INFINITY); });
    }
  }
  DTF_DEVICE A operator()(int c, int item) const {
    if constexpr (Shape::items > 0) return value[item];
    return widen(source[c]);
  }
  // Replaces what is in registers.
  template <typename F>
  DTF_DEVICE void map(F f) {
    static_assert(Shape::items > 0);
    for_classes<Shape>(classes, [&](int, int item) { value[item] = f(value[item]); });
  }
};
// f(c, item) of all lanes of the row, combined; each of them gets the result.
template <typename Shape, typename A, typename F, typename Combine>
DTF_DEVICE A over_classes(int classes, A nothing, F f, Combine combine) {
  A x = nothing;
  for_classes<Shape>(classes, [&](int c, int item) { x = combine(x, f(c, item)); });
  return reduce<Shape::lanes>(x, combine);
}

// The label of a row, and what makes the results of a row with a wrong label show: NaN instead of x.
DTF_DEVICE int64_t row_label(const int64_t* labels, int64_t row, bool valid) { return valid ? labels[row] : 0; }
template <typename A>
DTF_DEVICE A nan_unless_class(int64_t label, int classes, A x) {
  return select(is_class(label, classes), x, A(NAN));
}

// Writes f(c, item) to this lane's classes of a row.
template <typename Shape, typename T, typename F>
DTF_DEVICE void write_row(T* matrix, int64_t row, int classes, bool valid, F f) {
  T* target = matrix + row * classes;
  for_classes<Shape>(classes, [&](int c, int item) {
    if (valid && c < classes) narrow(f(c, item), target[c]);
  });
}

}  // namespace dtf
