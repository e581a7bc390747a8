// Epilogue: one finished tile of dot products, still in cache, becomes sums, a maximum, counts.
#pragma once

#include "arithmetic.h"

namespace orthofast {
namespace {

// What a block task carries from tile to tile; sums per lane in float64, joined at the end in a fixed order.
template <class A>
struct Running {
  using Acc = typename A::Acc;
  static constexpr int kLanes = A::kLanes;
  const BlockTask& task;
  const Acc* inv_left;   // (rows, padded) factors of the block's vectors; zero in the padding
  const Acc* inv_right;  // (cols, padded)
  double abs_lane[kLanes] = {}, sq_lane[kLanes] = {}, sum_lane[kLanes] = {};
  Partial best = empty_partial();
};

// A tile: kRows rows from `i`, `width` vectors of columns from `j`, both relative to the block.
struct TilePlace {
  int64_t i, j;
  int width;
};

template <class V, int N>
inline void add_lanes(double* into, V v) {
#pragma GCC unroll 16
  for (int e = 0; e < N; ++e) into[e] += v[e];
}

// |cos| summed, the common case: the column factor inside, the row factor once a row.
template <class A, int W>
inline void fold_abs(Running<A>& run, const typename A::Acc* tile, TilePlace place) {
  using V = typename A::V;
  constexpr int L = A::kLanes;
  V factor[W];
  for (int w = 0; w < W; ++w) factor[w] = load_as<V>(run.inv_right + place.j + w * L);
  V total{};
#pragma GCC unroll 8
  for (int r = 0; r < A::kRows; ++r) {
    V line{};
    for (int w = 0; w < W; ++w) line += abs_of<L>(load_as<V>(tile + r * A::kPanel + w * L) * factor[w]);
    total += line * run.inv_left[place.i + r];
  }
  add_lanes<V, L>(run.abs_lane, total);
}

template <class A>
inline void raise_maximum(Running<A>& run, const typename A::Acc* cosines, TilePlace place, double tile_max) {
  const int64_t row0 = run.task.row0 + place.i, col0 = run.task.col0 + place.j;
  if (tile_max < run.best.abs_max || (tile_max == run.best.abs_max && row0 > run.best.i)) return;
  for (int r = 0; r < A::kRows; ++r) {
    for (int c = 0; c < place.width * A::kLanes; ++c) {
      const double value = cosines[r * A::kPanel + c] < 0 ? -cosines[r * A::kPanel + c] : cosines[r * A::kPanel + c];
      if (value == tile_max && outranks(value, row0 + r, col0 + c, run.best)) {
        run.best.abs_max = value;
        run.best.i = row0 + r;
        run.best.j = col0 + c;
      }
    }
  }
}

template <class A>
inline void count_bins(Running<A>& run, const typename A::Acc* cosines, TilePlace place) {
  const BlockTask& task = run.task;
  const int64_t row_end = task.rows - place.i < A::kRows ? task.rows - place.i : A::kRows;
  const int64_t wide = place.width * A::kLanes;
  const int64_t col_end = task.cols - place.j < wide ? task.cols - place.j : wide;
  const typename A::Acc half = static_cast<typename A::Acc>(task.bins) / 2;
  const int32_t last = task.bins - 1;
  for (int64_t r = 0; r < row_end; ++r) {
    const int64_t past_diagonal = task.diagonal ? place.i + r + 1 - place.j : 0;
    int32_t bin[A::kPanel];
    for (int64_t c = 0; c < wide; ++c) {
      const int32_t index = static_cast<int32_t>((cosines[r * A::kPanel + c] + 1) * half);
      bin[c] = index < 0 ? 0 : (index > last ? last : index);
    }
    for (int64_t c = past_diagonal > 0 ? past_diagonal : 0; c < col_end; ++c) ++task.hist[bin[c]];
  }
}

// Every other field: cosines are formed in place, then each wanted reduction reads them.
template <class A, int W>
inline void fold_all(Running<A>& run, typename A::Acc* tile, TilePlace place) {
  using V = typename A::V;
  constexpr int L = A::kLanes;
  const BlockTask& task = run.task;
  V abs_total{}, sq_total{}, sum_total{}, largest{};
  V column_abs[W] = {};
  for (int r = 0; r < A::kRows; ++r) {
    V row_abs{};
    for (int w = 0; w < W; ++w) {
      typename A::Acc* at = tile + r * A::kPanel + w * L;
      const V factor = load_as<V>(run.inv_right + place.j + w * L);
      const V cosine = load_as<V>(at) * factor * run.inv_left[place.i + r];
      const V size = abs_of<L>(cosine);
      store_as(at, cosine);
      row_abs += size;
      column_abs[w] += size;
      sq_total += cosine * cosine;
      sum_total += cosine;
      largest = size > largest ? size : largest;
    }
    abs_total += row_abs;
    if (task.left_abs != nullptr && place.i + r < task.rows) {
      double total = 0;
      for (int e = 0; e < L; ++e) total += row_abs[e];
      task.left_abs[place.i + r] += total;
    }
  }
  add_lanes<V, L>(run.abs_lane, abs_total);
  add_lanes<V, L>(run.sq_lane, sq_total);
  add_lanes<V, L>(run.sum_lane, sum_total);
  if (task.right_abs != nullptr) {
    for (int w = 0; w < W; ++w) {
      for (int e = 0; e < L && place.j + w * L + e < task.cols; ++e) task.right_abs[place.j + w * L + e] += column_abs[w][e];
    }
  }
  if (task.want & kAbsMax) {
    double tile_max = 0;
    for (int e = 0; e < L; ++e) tile_max = largest[e] > tile_max ? largest[e] : tile_max;
    // zero is nobody's maximum yet: the driver names the first pair where all cosines vanish
    if (tile_max > 0) raise_maximum(run, tile, place, tile_max);
  }
  if (task.hist != nullptr) count_bins(run, tile, place);
}

// Clears what lies on or below the diagonal of a tile that the diagonal crosses.
template <class A>
inline void clear_below_diagonal(typename A::Acc* tile, TilePlace place) {
  for (int r = 0; r < A::kRows; ++r) {
    const int64_t end = place.i + r + 1 - place.j;
    for (int64_t c = 0; c < end && c < place.width * A::kLanes; ++c) tile[r * A::kPanel + c] = 0;
  }
}

template <class A, int W>
inline void finish_tile(Running<A>& run, typename A::Acc* tile, TilePlace place) {
  if (run.task.diagonal && place.i + A::kRows > place.j) clear_below_diagonal<A>(tile, place);
  if (run.task.want == kAbsSum) {
    fold_abs<A, W>(run, tile, place);
  } else {
    fold_all<A, W>(run, tile, place);
  }
}

}  // namespace
}  // namespace orthofast
