// Packing: a block of vectors, any dtype and strides, into panels [k][vector] of the arithmetic's elements.
#pragma once

#include "arithmetic.h"

namespace orthofast {
namespace {

// Packs vectors row0 .. row0+rows-1, source elements k0 .. k0+depth-1, as panels of A::kPanel vectors:
// out[panel][k][vector], zero where a vector register is not full; registers beyond the last vector are never read. `depth` is a multiple of A::kStep except at the end.
template <class A, Dtype S>
struct Packer {
  using Elem = typename A::Elem;
  using T = typename Stored<S>::Type;
  using V = typename A::V;
  static constexpr int kLanes = A::kLanes;
  using Lane4 = Vec<uint32_t, kLanes>;

  static constexpr int64_t kAhead = 4;  // lines of columns, fetched before they are read

  const ItemView& view;
  int64_t d, row0, rows, k0, steps;  // steps: packed elements along k

  const T* at(int64_t row, int64_t k) const {
    return static_cast<const T*>(view.data) + row * view.stride_n + k * view.stride_d;
  }

  void run(Elem* out) const {
    if (view.stride_n == 1 && view.stride_d != 1 && view.exponent == nullptr) {
      run_across(out);
      return;
    }
    for (int64_t panel = 0; panel < rows; panel += A::kPanel) {
      for (int64_t lane = 0; lane < A::kPanel && panel + lane < rows; lane += kLanes) {
        const int64_t first = panel + lane;
        int64_t k = 0;
        if (view.stride_d == 1 && view.exponent == nullptr && first + kLanes <= rows) k = along(first, out + lane);
        one_by_one(first, k, out + lane);
      }
      out += A::kPanel * steps;
    }
  }

  // kLanes vectors from `first`, packed elements from k on; any strides, scales and ends
  void one_by_one(int64_t first, int64_t k, Elem* out) const {
    const int64_t here = rows - first < kLanes ? rows - first : kLanes;
    for (; k < steps; ++k) {
      Elem* line = out + k * A::kPanel;
      for (int64_t e = 0; e < kLanes; ++e) {
        line[e] = e < here ? A::template read<S>(view, row0 + first + e, k0 + k * A::kStep, d) : Elem(0);
      }
    }
  }

  // contiguous vectors: load kLanes x kLanes blocks and transpose them in registers
  int64_t along(int64_t first, Elem* out) const {
    int64_t k = 0;
    // the next vectors come from memory while these are transposed; the last have no next
    const int64_t next = first + 2 * kLanes <= rows ? kLanes : 0;
    if constexpr (sizeof(Elem) == 4) {
      for (; k + kLanes <= steps && k0 + (k + kLanes) * A::kStep <= d; k += kLanes) {
        Lane4 block[kLanes];
        const T* source = at(row0 + first, k0 + k * A::kStep);
        const T* ahead = source + next * view.stride_n;
#pragma GCC unroll 16
        for (int e = 0; e < kLanes; ++e) {
          block[e] = (Lane4)A::template along<S>(source + e * view.stride_n, view.table8);
          __builtin_prefetch(ahead + e * view.stride_n, 0, 2);
        }
        transpose<kLanes>(block);
#pragma GCC unroll 16
        for (int e = 0; e < kLanes; ++e) store_as(out + (k + e) * A::kPanel, block[e]);
      }
    }
    return k;
  }

  // vectors side by side in memory (columns): a line of the block at a time, so that memory is read in long runs
  void run_across(Elem* out) const {
    int64_t whole = (d - k0) / A::kStep < steps ? (d - k0) / A::kStep : steps;
    const int64_t lanes_end = rows - rows % kLanes;
    for (int64_t k = 0; k < whole; ++k) {
      const T* source = at(row0, k0 + k * A::kStep);
      const T* ahead = source + (k + kAhead < whole ? kAhead * A::kStep * view.stride_d : 0);
      Elem* line = out + k * A::kPanel;
      int64_t lane = 0;
      for (int64_t first = 0; first < lanes_end; first += kLanes) {
        __builtin_prefetch(ahead + first, 0, 2);
        store_as(line + lane, A::template across<S>(source + first, source + first + view.stride_d, view.table8));
        lane += kLanes;
        if (lane == A::kPanel) lane = 0, line += A::kPanel * steps;
      }
    }
    for (int64_t first = 0; first < rows; first += kLanes) {
      one_by_one(first, first < lanes_end ? whole : 0, out + first / A::kPanel * A::kPanel * steps + first % A::kPanel);
    }
  }
};

template <class A>
inline void pack(const ItemView& view, Dtype dtype, int64_t d, int64_t row0, int64_t rows, int64_t k0, int64_t steps,
                 typename A::Elem* out) {
  with_dtype(dtype, [&](auto tag) {
    Packer<A, decltype(tag)::value>{view, d, row0, rows, k0, steps}.run(out);
  });
}

}  // namespace
}  // namespace orthofast
