// Vectors of the compiler's own extension: one source for every width, arithmetic by plain operators.
#pragma once

#include <cstdint>
#include <cstring>

namespace orthofast {
namespace {

template <class T, int N>
struct VectorOf {
  typedef T Type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using Vec = typename VectorOf<T, N>::Type;

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));  // compiles to one unaligned load
  return v;
}

template <class V>
inline void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

template <int N>
inline Vec<float, N> abs_of(Vec<float, N> v) {
  using I = Vec<int32_t, N>;
  return (Vec<float, N>)((I)v & (I{} + 0x7fffffff));
}
template <int N>
inline Vec<double, N> abs_of(Vec<double, N> v) {
  using I = Vec<int64_t, N>;
  return (Vec<double, N>)((I)v & (I{} + 0x7fffffffffffffff));
}

// Transposes an N x N block held in N vectors, in log2(N) rounds of two-input shuffles.
template <int N, class V>
inline void transpose(V (&row)[N]) {
  using I = Vec<int32_t, N>;
  static_assert(sizeof(I) == sizeof(V), "4-byte elements");
#pragma GCC unroll 8
  for (int s = 1; s < N; s *= 2) {
    I keep{}, swap{};
    for (int e = 0; e < N; ++e) {
      keep[e] = (e & s) ? N + e - s : e;  // even blocks of a, then even blocks of b in the odd places
      swap[e] = (e & s) ? N + e : e + s;
    }
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) {
      if (i & s) continue;
      const V a = row[i], b = row[i | s];
      row[i] = __builtin_shuffle(a, b, keep);
      row[i | s] = __builtin_shuffle(a, b, swap);
    }
  }
}

}  // namespace
}  // namespace orthofast
