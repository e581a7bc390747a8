// The arithmetics of a tile: what a packed element is, how it is read, and how two of them multiply.
//
// An arithmetic A has  Elem  (packed element), kStep (source elements in it), Acc, kLanes (Acc in a vector),
// kPanel (vectors in a packed panel), kRows (rows of the register block) and the functions below.
#pragma once

#include "scalar_read.h"
#include "vector_types.h"

namespace orthofast {
namespace {

// Plain multiply-add in T: float32 or float64.
template <class T, int Lanes, int Rows, int Columns>
struct Plain {
  using Elem = T;
  using Acc = T;
  using V = Vec<T, Lanes>;
  static constexpr int kStep = 1, kLanes = Lanes, kRows = Rows, kColumns = Columns, kPanel = Lanes * Columns;

  static V load(const Elem* p) { return load_as<V>(p); }
  static V multiply_add(V acc, const Elem* a, V b) { return acc + *a * b; }

  template <Dtype S>
  static Elem read(const ItemView& view, int64_t row, int64_t k, int64_t d) {
    return static_cast<Elem>(read_scaled<S>(view, row, k, d));
  }
  // Lanes stored elements side by side; whether they are of one vector or across vectors is the caller's matter
  template <Dtype S>
  static V convert(const typename Stored<S>::Type* p, const float* table) {
    if constexpr (sizeof(typename Stored<S>::Type) == sizeof(T)) {
      return load_as<V>(p);
    } else if constexpr (S == Dtype::bf16 && sizeof(T) == 4) {
      const auto wide = __builtin_convertvector(load_as<Vec<uint16_t, Lanes>>(p), Vec<uint32_t, Lanes>);
      return (V)(wide << 16);
    } else {
      V v;
      for (int e = 0; e < Lanes; ++e) v[e] = static_cast<T>(Stored<S>::value(p + e, table));
      return v;
    }
  }
  template <Dtype S>
  static V along(const typename Stored<S>::Type* p, const float* table) {
    return convert<S>(p, table);
  }
  template <Dtype S>
  static V across(const typename Stored<S>::Type* p, const typename Stored<S>::Type*, const float* table) {
    return convert<S>(p, table);
  }
};

}  // namespace
}  // namespace orthofast
