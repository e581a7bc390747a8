// One pair of blocks: pack both, multiply in registers, hand each finished tile to the epilogue.
//
// Work   rows * cols * d multiply-adds.  Memory  two packed blocks of kDepthBytes a vector, and one block of
// accumulators where d needs several passes; all of it stays in L2 and L3.
#pragma once

#include "epilogue.h"
#include "panel_pack.h"

namespace orthofast {
namespace {

// Register block: kRows rows times W vectors of columns, over `steps` packed elements.
// `from` holds the sums of earlier passes (null at the first), `to` takes the new ones; both [row][kPanel].
template <class A, int W>
inline void multiply_tile(const typename A::Elem* a, const typename A::Elem* b, int64_t steps,
                          const typename A::Acc* from, typename A::Acc* to) {
  using V = typename A::V;
  V acc[A::kRows][W];
#pragma GCC unroll 8
  for (int r = 0; r < A::kRows; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) acc[r][w] = from ? load_as<V>(from + r * A::kPanel + w * A::kLanes) : V{};
  }
  for (int64_t k = 0; k < steps; ++k) {
    V column[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) column[w] = A::load(b + w * A::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < A::kRows; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[r][w] = A::multiply_add(acc[r][w], a + r, column[w]);
    }
    a += A::kPanel;
    b += A::kPanel;
  }
#pragma GCC unroll 8
  for (int r = 0; r < A::kRows; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store_as(to + r * A::kPanel + w * A::kLanes, acc[r][w]);
  }
}

template <class A>
struct BlockFold {
  using Elem = typename A::Elem;
  using Acc = typename A::Acc;
  static constexpr int kPanel = A::kPanel;
  static constexpr int64_t kDepth = kDepthBytes / sizeof(Elem);  // packed elements in a pass
  static constexpr int64_t kPadded = kMaxBlock + kPanel;

  struct Workspace {
    uint64_t strip_key;  // which block the strip holds; fresh memory and 0 name none
    alignas(64) Elem left[kMaxBlock * kDepth];
    alignas(64) Elem right[kMaxBlock * kDepth];
    alignas(64) Acc sums[kMaxBlock * kMaxBlock];  // [tile][row][kPanel]
    alignas(64) Acc tile[A::kRows * kPanel];
    alignas(64) Acc inv_left[kPadded];
    alignas(64) Acc inv_right[kPadded];
  };

  const BlockTask& task;
  Workspace& space;
  Running<A> run;

  template <int W>
  void tile(TilePlace place, const Elem* a, const Elem* b, int64_t steps, Acc* sums, bool first, bool last) {
    multiply_tile<A, W>(a, b, steps, first ? nullptr : sums, last ? space.tile : sums);
    if (last) finish_tile<A, W>(run, space.tile, place);
  }

  // all tiles of the block for one pass over k
  void pass(const Elem* left, const Elem* right, int64_t steps, bool first, bool last) {
    Acc* sums = space.sums;
    for (int64_t j = 0; j < task.cols; j += kPanel) {
      const Elem* panel = right + j * steps;
      const int64_t row_end = task.diagonal && j + kPanel < task.rows ? j + kPanel : task.rows;
      const int64_t col_end = task.cols - j < kPanel ? task.cols - j : kPanel;
      const int width = static_cast<int>((col_end + A::kLanes - 1) / A::kLanes);
      for (int64_t i = 0; i < row_end; i += A::kRows, sums += A::kRows * kPanel) {
        // vectors of columns wholly on or below the diagonal are left out
        int skip = task.diagonal && i > j ? static_cast<int>((i + 1 - j) / A::kLanes) : 0;
        if (skip >= width) continue;
        const Elem* a = left + (i / kPanel) * kPanel * steps + i % kPanel;
        const Elem* b = panel + skip * A::kLanes;
        const TilePlace place{i, j + skip * A::kLanes, width - skip};
        switch (place.width) {
          case 1: tile<1>(place, a, b, steps, sums, first, last); break;
          case 2: tile<2>(place, a, b, steps, sums, first, last); break;
          default: tile<A::kColumns>(place, a, b, steps, sums, first, last); break;
        }
      }
    }
  }

  void load_factors(const ItemView& view, int64_t first, int64_t count, Acc* out) const {
    for (int64_t e = 0; e < kPadded; ++e) out[e] = e < count ? static_cast<Acc>(view.inv[first + e]) : Acc(0);
  }

  // the right block, packed for this pass; from the strip where it fits, else on the spot
  const Elem* right_block(int64_t k, int64_t steps, bool keep, bool kept) {
    if (task.diagonal) return space.left;
    const int64_t padded = (task.cols + kPanel - 1) / kPanel * kPanel;
    Elem* to = keep ? reinterpret_cast<Elem*>(task.strip) + k / A::kStep * padded : space.right;
    if (!kept) pack<A>(*task.right, task.dtype, task.d, task.col0, task.cols, k, steps, to);
    return to;
  }

  void fold(Partial& out) {
    load_factors(*task.left, task.row0, task.rows, space.inv_left);
    load_factors(*task.right, task.col0, task.cols, space.inv_right);
    const int64_t all_steps = (task.d + A::kStep - 1) / A::kStep;
    const bool keep = !task.diagonal && static_cast<size_t>(all_steps * kMaxBlock) * sizeof(Elem) <= task.strip_bytes;
    const bool kept = keep && space.strip_key == task.right_key;
    if (keep) space.strip_key = task.right_key;
    int64_t k = 0;
    do {  // also once for d = 0
      const int64_t left_over = all_steps - k / A::kStep;
      const int64_t steps = left_over < kDepth ? left_over : kDepth;
      pack<A>(*task.left, task.dtype, task.d, task.row0, task.rows, k, steps, space.left);
      const Elem* right = right_block(k, steps, keep, kept);
      const int64_t next = k + steps * A::kStep;
      pass(space.left, right, steps, k == 0, next >= task.d);
      k = next;
    } while (k < task.d);
    out = run.best;
    for (int e = 0; e < A::kLanes; ++e) {
      out.abs_sum += run.abs_lane[e];
      out.sq_sum += run.sq_lane[e];
      out.sum += run.sum_lane[e];
    }
  }
};

template <class A>
void fold_block(const BlockTask& task, char* workspace, Partial& out) {
  auto& space = *reinterpret_cast<typename BlockFold<A>::Workspace*>(workspace);
  BlockFold<A> block{task, space, {task, space.inv_left, space.inv_right}};
  block.fold(out);
}

template <class A>
constexpr size_t workspace_bytes() {
  return sizeof(typename BlockFold<A>::Workspace);
}

// Flop of the register block fed from the first-level cache: the ceiling every fold is measured against.
template <class A>
double spin(int64_t steps) {
  constexpr int64_t kTrip = 16;
  alignas(64) typename A::Elem a[A::kPanel * kTrip] = {}, b[A::kPanel * kTrip] = {};
  alignas(64) typename A::Acc out[A::kRows * A::kPanel] = {};
  using V = typename A::V;
  V acc[A::kRows][A::kColumns] = {};
  for (int64_t s = 0; s < steps; s += kTrip) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");  // the operands may have changed: load them again
    for (int64_t k = 0; k < kTrip; ++k) {
      V column[A::kColumns];
#pragma GCC unroll 4
      for (int w = 0; w < A::kColumns; ++w) column[w] = A::load(b + k * A::kPanel + w * A::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < A::kRows; ++r) {
#pragma GCC unroll 4
        for (int w = 0; w < A::kColumns; ++w) acc[r][w] = A::multiply_add(acc[r][w], a + k * A::kPanel + r, column[w]);
      }
    }
  }
  for (int r = 0; r < A::kRows; ++r) {
    for (int w = 0; w < A::kColumns; ++w) store_as(out + r * A::kPanel + w * A::kLanes, acc[r][w]);
  }
  asm volatile("" : : "r"(out) : "memory");
  return 2.0 * A::kStep * A::kRows * A::kPanel * static_cast<double>((steps + kTrip - 1) / kTrip * kTrip);
}

}  // namespace
}  // namespace orthofast
