// Packing: a block of vectors, any dtype and strides, into panels [k][vector] of the arithmetic's elements.
#pragma once

#include "arithmetic.h"

namespace orthofast {
namespace {

// Packs vectors row0 .. row0+rows-1, source elements k0 .. k0+depth-1, as panels of A::kPanel vectors:
// out[panel][k][vector], zero where a panel is not full. `depth` is a multiple of A::kStep except at the end.
template <class A, Dtype S>
struct Packer {
  using Elem = typename A::Elem;
  using T = typename Stored<S>::Type;
  using V = typename A::V;
  static constexpr int kLanes = A::kLanes;
  using Lane4 = Vec<uint32_t, kLanes>;

  const ItemView& view;
  int64_t d, row0, rows, k0, steps;  // steps: packed elements along k

  const T* at(int64_t row, int64_t k) const {
    return static_cast<const T*>(view.data) + row * view.stride_n + k * view.stride_d;
  }

  void run(Elem* out) const {
    for (int64_t panel = 0; panel < rows; panel += A::kPanel) {
      for (int64_t lane = 0; lane < A::kPanel; lane += kLanes) pack_lanes(panel + lane, out + lane);
      out += A::kPanel * steps;
    }
  }

  // kLanes vectors from `first`, written with a stride of one panel row per k
  void pack_lanes(int64_t first, Elem* out) const {
    const int64_t here = rows - first < kLanes ? rows - first : kLanes;
    int64_t k = 0;
    if (here == kLanes && view.exponent == nullptr) {
      if (view.stride_d == 1 && sizeof(Elem) == 4) k = along(first, out);
      if (view.stride_n == 1 && k == 0) k = across(first, out);
    }
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
    if constexpr (sizeof(Elem) == 4) {
      for (; k + kLanes <= steps && k0 + (k + kLanes) * A::kStep <= d; k += kLanes) {
        Lane4 block[kLanes];
        const T* source = at(row0 + first, k0 + k * A::kStep);
#pragma GCC unroll 16
        for (int e = 0; e < kLanes; ++e) {
          block[e] = (Lane4)A::template along<S>(source + e * view.stride_n, view.table8);
        }
        transpose<kLanes>(block);
#pragma GCC unroll 16
        for (int e = 0; e < kLanes; ++e) store_as(out + (k + e) * A::kPanel, block[e]);
      }
    }
    return k;
  }

  // vectors side by side in memory (columns): each k is one load
  int64_t across(int64_t first, Elem* out) const {
    int64_t k = 0;
    for (; k < steps && k0 + (k + 1) * A::kStep <= d; ++k) {
      const T* source = at(row0 + first, k0 + k * A::kStep);
      store_as(out + k * A::kPanel, A::template across<S>(source, source + view.stride_d, view.table8));
    }
    return k;
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
