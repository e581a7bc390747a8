// One pair of blocks of unit vectors: cosines, their curve and its derivatives in place, two products onto the gradients.
//
// Work   3 * rows * cols * d multiply-adds.  Memory  one block of derivatives and packed operands, which stay in L2.
// With T_ij = f'(u_i . u_j):  G_i += sum over j of T_ij u_j  and  G_j += sum over i of T_ij u_i.
#pragma once

#include <algorithm>
#include <cmath>

#include "epilogue.h"
#include "panel_pack.h"

// a function of its own: inlined into its callers, their values would take the accumulators' registers
#define ORTHOFAST_APART __attribute__((noinline))

namespace orthofast {
namespace {

template <class A, int W>
struct Accumulators {
  using V = typename A::V;
  V acc[A::kRows][W];

  void clear() {
#pragma GCC unroll 8
    for (int r = 0; r < A::kRows; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[r][w] = V{};
    }
  }
  void load(const typename A::Acc* from) {
#pragma GCC unroll 8
    for (int r = 0; r < A::kRows; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[r][w] = load_as<V>(from + r * A::kPanel + w * A::kLanes);
    }
  }
  void store(typename A::Acc* to) const {
#pragma GCC unroll 8
    for (int r = 0; r < A::kRows; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) store_as(to + r * A::kPanel + w * A::kLanes, acc[r][w]);
    }
  }
  // `steps` outer products; row r reads a[r * RowStep], one step further a += Step, b += kPanel
  template <int RowStep, int Step>
  void add(const typename A::Elem* a, const typename A::Elem* b, int64_t steps) {
    for (int64_t k = 0; k < steps; ++k) {
      V column[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) column[w] = A::load(b + w * A::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < A::kRows; ++r) {
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) acc[r][w] = A::multiply_add(acc[r][w], a + r * RowStep, column[w]);
      }
      a += Step;
      b += A::kPanel;
    }
  }
};

// A tile of cosines becomes the curve's derivatives; what the curve sums to is added to `lanes`.
template <class A, int W>
inline void bend_abs(typename A::Acc* tile, double* lanes) {
  using V = typename A::V;
  constexpr int L = A::kLanes;
  using I = decltype(V{} > V{});
  const I one = (I)(V{} + 1);
  V total{};
#pragma GCC unroll 8
  for (int r = 0; r < A::kRows; ++r) {
    for (int w = 0; w < W; ++w) {
      typename A::Acc* at = tile + r * A::kPanel + w * L;
      const V c = load_as<V>(at), zero{};
      total += abs_of<L>(c);
      store_as(at, (V)((I)(c > zero) & one) - (V)((I)(c < zero) & one));
    }
  }
  add_lanes<V, L>(lanes, total);
}

template <class T>
inline T bent(CurveKind kind, T width, T& c) {
  if (kind == CurveKind::square) {
    const T value = c * c;
    c = 2 * c;
    return value;
  }
  if (kind == CurveKind::sqrt) {
    const T length = std::sqrt(c * c + width * width), value = c * c / (length + width);
    c = c / length;
    return value;
  }
  const T size = c < 0 ? -c : c, inside = size < width ? size : width;
  const T slope = c / width;
  c = slope > 1 ? T(1) : slope < -1 ? T(-1) : slope;
  return (size - inside) + inside * inside / (2 * width);
}

template <class A, int W>
inline void bend_other(CurveKind kind, typename A::Acc width, typename A::Acc* tile, double* lanes) {
  using V = typename A::V;
  V total{};
  for (int r = 0; r < A::kRows; ++r) {
    typename A::Acc value[A::kPanel];
    for (int e = 0; e < W * A::kLanes; ++e) value[e] = bent(kind, width, tile[r * A::kPanel + e]);
    for (int w = 0; w < W; ++w) total += load_as<V>(value + w * A::kLanes);
  }
  add_lanes<V, A::kLanes>(lanes, total);
}

template <class A>
struct GradientBlock {
  using Elem = typename A::Elem;
  static constexpr int kPanel = A::kPanel, kLanes = A::kLanes, kRows = A::kRows;
  static constexpr Dtype kDtype = sizeof(Elem) == 4 ? Dtype::f32 : Dtype::f64;
  static constexpr int64_t kDepth = kDepthBytes / sizeof(Elem);
  static constexpr int64_t kPanels = (kMaxGradientBlock + kPanel - 1) / kPanel;
  static constexpr int64_t kSide = kPanels * kPanel;     // rows of a block, rounded up
  static constexpr int64_t kPanelSize = kSide * kPanel;  // a panel of derivatives: [row][kPanel]

  struct Workspace {
    alignas(64) char kept[64];  // the fold's key lies here, see fold_block.h
    alignas(64) Elem left[kSide * kDepth];
    alignas(64) Elem right[kSide * kDepth];
    alignas(64) Elem bends[kPanels * kPanelSize];  // cosines, then derivatives: [panel of columns][row][kPanel]
    alignas(64) Elem features[kSide * kPanel];     // [vector][kPanel features]
  };

  const GradientTask& task;
  Workspace& space;
  double lanes[kLanes] = {};

  const Elem* units(const void* of, int64_t row) const { return static_cast<const Elem*>(of) + row * task.d; }

  template <int W>
  ORTHOFAST_APART void cosine_tile(const Elem* a, const Elem* b, int64_t steps, Elem* tile, bool first) {
    Accumulators<A, W> sums;
    if (first) {
      sums.clear();
    } else {
      sums.load(tile);
    }
    sums.template add<1, kPanel>(a, b, steps);
    sums.store(tile);
  }

  template <int W>
  ORTHOFAST_APART void bend_tile(Elem* tile, int64_t i, int64_t j) {
    // packing fills registers, and a narrow one may end before the tile does
    for (int64_t r = task.rows - i; r < kRows; ++r) std::fill_n(tile + r * kPanel, W * kLanes, Elem(0));
    if (task.diagonal) {
      for (int r = 0; r < kRows; ++r) {
        if (i + r >= j && i + r < j + kPanel) tile[r * kPanel + i + r - j] = 0;
      }
    }
    if (task.curve == CurveKind::abs) {
      bend_abs<A, W>(tile, lanes);
    } else {
      bend_other<A, W>(task.curve, static_cast<Elem>(task.width), tile, lanes);
    }
  }

  template <int W>
  void pass_tile(const Elem* a, const Elem* b, int64_t steps, Elem* tile, int64_t i, int64_t j, bool first, bool last) {
    cosine_tile<W>(a, b, steps, tile, first);
    if (last) bend_tile<W>(tile, i, j);
  }

  void cosines() {
    const ItemView left{task.left, task.n_left, task.d, 1, nullptr, nullptr, nullptr};
    const ItemView right{task.right, task.n_right, task.d, 1, nullptr, nullptr, nullptr};
    int64_t k = 0;
    do {  // also once for d = 0
      const int64_t steps = task.d - k < kDepth ? task.d - k : kDepth;
      pack<A>(left, kDtype, task.d, task.row0, task.rows, k, steps, space.left);
      if (!task.diagonal) pack<A>(right, kDtype, task.d, task.col0, task.cols, k, steps, space.right);
      const Elem* packed = task.diagonal ? space.left : space.right;
      const bool first = k == 0, last = k + steps >= task.d;
      for (int64_t j = 0; j < task.cols; j += kPanel) {
        const int64_t here = task.cols - j < kPanel ? task.cols - j : kPanel;
        const int width = static_cast<int>((here + kLanes - 1) / kLanes);
        for (int64_t i = 0; i < task.rows; i += kRows) {
          const Elem* a = space.left + i / kPanel * kPanel * steps + i % kPanel;
          const Elem* b = packed + j * steps;
          Elem* tile = space.bends + j / kPanel * kPanelSize + i * kPanel;
          switch (width) {
            case 1: pass_tile<1>(a, b, steps, tile, i, j, first, last); break;
            case 2: pass_tile<2>(a, b, steps, tile, i, j, first, last); break;
            default: pass_tile<A::kColumns>(a, b, steps, tile, i, j, first, last); break;
          }
        }
      }
      k += steps;
    } while (k < task.d);
  }

  // adds a finished tile to kRows lines of a gradient, as far as they are there
  template <int W>
  void add_tile(const Accumulators<A, W>& sums, Elem* to, int64_t rows, int64_t columns) {
    using V = typename A::V;
    if (columns == W * kLanes) {
      for (int r = 0; r < kRows && r < rows; ++r) {
        Elem* line = to + r * task.d;
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) store_as(line + w * kLanes, load_as<V>(line + w * kLanes) + sums.acc[r][w]);
      }
      return;
    }
    alignas(64) Elem tile[kRows * kPanel] = {};
    sums.store(tile);
    for (int r = 0; r < kRows && r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) to[r * task.d + c] += tile[r * kPanel + c];
    }
  }

  // `features` holds kPanel features of the partners; rows of the block take T times them
  template <int W>
  ORTHOFAST_APART void onto_left(Elem* gradient, int64_t columns) {
    for (int64_t i = 0; i < task.rows; i += kRows) {
      Elem* to = gradient + i * task.d;
      const int64_t rows = task.rows - i;
      for (int r = 0; r < kRows && r < rows; ++r) __builtin_prefetch(to + r * task.d, 1);
      Accumulators<A, W> sums;
      sums.clear();
      for (int64_t j = 0; j < task.cols; j += kPanel) {
        const int64_t steps = task.cols - j < kPanel ? task.cols - j : kPanel;
        sums.template add<kPanel, 1>(space.bends + j / kPanel * kPanelSize + i * kPanel, space.features + j * kPanel, steps);
      }
      add_tile<W>(sums, to, rows, columns);
    }
  }

  template <int W>
  ORTHOFAST_APART void onto_right(Elem* gradient, int64_t columns) {
    for (int64_t j = 0; j < task.cols; j += kRows) {
      Elem* to = gradient + j * task.d;
      const int64_t rows = task.cols - j;
      for (int r = 0; r < kRows && r < rows; ++r) __builtin_prefetch(to + r * task.d, 1);
      Accumulators<A, W> sums;
      sums.clear();
      sums.template add<1, kPanel>(space.bends + j / kPanel * kPanelSize + j % kPanel, space.features, task.rows);
      add_tile<W>(sums, to, rows, columns);
    }
  }

  template <int W>
  void both(int64_t feature, int64_t columns) {
    Elem* left = static_cast<Elem*>(task.left_gradient) + task.row0 * task.d + feature;
    load_features(units(task.right, task.col0) + feature, task.cols, columns);
    onto_left<W>(left, columns);
    if (task.diagonal) return;  // there T is symmetric and whole
    Elem* right = static_cast<Elem*>(task.right_gradient) + task.col0 * task.d + feature;
    load_features(units(task.left, task.row0) + feature, task.rows, columns);
    onto_right<W>(right, columns);
  }

  void load_features(const Elem* from, int64_t vectors, int64_t columns) {
    for (int64_t v = 0; v < vectors; ++v) {
      Elem* to = space.features + v * kPanel;
      if (columns == kPanel) {
        std::memcpy(to, from + v * task.d, sizeof(Elem) * kPanel);
      } else {
        for (int64_t c = 0; c < kPanel; ++c) to[c] = c < columns ? from[v * task.d + c] : Elem(0);
      }
    }
  }

  double run() {
    cosines();
    if (task.left_gradient != nullptr) {
      for (int64_t feature = 0; feature < task.d; feature += kPanel) {
        const int64_t columns = task.d - feature < kPanel ? task.d - feature : kPanel;
        switch ((columns + kLanes - 1) / kLanes) {
          case 1: both<1>(feature, columns); break;
          case 2: both<2>(feature, columns); break;
          default: both<A::kColumns>(feature, columns); break;
        }
      }
    }
    double total = 0;
    for (int e = 0; e < kLanes; ++e) total += lanes[e];
    return task.diagonal ? total / 2 : total;
  }
};

template <class A>
double gradient_block(const GradientTask& task, char* workspace) {
  auto& space = *reinterpret_cast<typename GradientBlock<A>::Workspace*>(workspace);
  GradientBlock<A> block{task, space};
  return block.run();
}

// Gradients by unit vectors become gradients by vectors: (G - (G . u) u) / length, in place.
template <class A>
void remove_radial(const void* units, void* gradient, const double* inverse, int64_t vectors, int64_t d) {
  using V = typename A::V;
  using T = typename A::Elem;
  constexpr int L = A::kLanes;
  const T* unit = static_cast<const T*>(units);
  T* sums = static_cast<T*>(gradient);
  const int64_t whole = d - d % L;
  for (int64_t i = 0; i < vectors; ++i, unit += d, sums += d) {
    V lanes{};
    T rest = 0;
    for (int64_t k = 0; k < whole; k += L) lanes += load_as<V>(unit + k) * load_as<V>(sums + k);
    for (int64_t k = whole; k < d; ++k) rest += unit[k] * sums[k];
    double radial = rest;
    for (int e = 0; e < L; ++e) radial += lanes[e];
    const T along = static_cast<T>(radial);
    for (int64_t k = 0; k < d; ++k) sums[k] = static_cast<T>((sums[k] - along * unit[k]) * inverse[i]);
  }
}

template <class A>
constexpr size_t gradient_bytes() {
  return sizeof(typename GradientBlock<A>::Workspace);
}

template <class F32, class F64>
constexpr GradientTable gradient_table() {
  constexpr size_t bytes = gradient_bytes<F32>() > gradient_bytes<F64>() ? gradient_bytes<F32>() : gradient_bytes<F64>();
  return GradientTable{gradient_block<F32>, gradient_block<F64>, remove_radial<F32>, remove_radial<F64>, bytes};
}

}  // namespace
}  // namespace orthofast
