// Sums of squares of vectors in float64, for every dtype and stride; fixed order, so fixed bits.
#pragma once

#include "arithmetic.h"

namespace orthofast {
namespace {

template <Dtype S>
inline double rounded_to_bf16(typename Stored<S>::Type stored) {
  if constexpr (S == Dtype::f32) return f32_of_bf16(bf16_of_f32(stored));
  return 0.0;  // only float32 is ever rounded
}

constexpr int kChains = 32;  // independent sums: enough for the latency of an addition on any width

// one contiguous (or strided) vector
template <Dtype S>
inline double square_sum(const ItemView& view, int64_t row, int64_t d, bool rounded) {
  using T = typename Stored<S>::Type;
  const T* p = static_cast<const T*>(view.data) + row * view.stride_n;
  double chain[kChains] = {};
  int64_t k = 0;
  if (view.stride_d == 1 && !rounded) {
    for (; k + kChains <= d; k += kChains) {
      for (int e = 0; e < kChains; ++e) {
        const double value = Stored<S>::value(p + k + e, view.table8);
        chain[e] += value * value;
      }
    }
  } else if (view.stride_d == 1) {
    for (; k + kChains <= d; k += kChains) {
      for (int e = 0; e < kChains; ++e) {
        const double value = rounded_to_bf16<S>(p[k + e]);
        chain[e] += value * value;
      }
    }
  }
  for (; k < d; ++k) {
    const T* at = p + k * view.stride_d;
    const double value = rounded ? rounded_to_bf16<S>(*at) : static_cast<double>(Stored<S>::value(at, view.table8));
    chain[k % kChains] += value * value;
  }
  double total = 0;
  for (double part : chain) total += part;
  return total;
}

// vectors side by side in memory: sums grow together while the rows stream by
template <Dtype S>
inline void square_sums_across(const ItemView& view, int64_t d, int64_t first, int64_t count, double* out, bool rounded) {
  using T = typename Stored<S>::Type;
  constexpr int64_t kTogether = 64;
  for (int64_t start = 0; start < count; start += kTogether) {
    const int64_t here = count - start < kTogether ? count - start : kTogether;
    double sum[kTogether] = {};
    for (int64_t k = 0; k < d; ++k) {
      const T* p = static_cast<const T*>(view.data) + (first + start) + k * view.stride_d;
      if (rounded) {
        for (int64_t e = 0; e < here; ++e) {
          const double value = rounded_to_bf16<S>(p[e]);
          sum[e] += value * value;
        }
      } else {
        for (int64_t e = 0; e < here; ++e) {
          const double value = Stored<S>::value(p + e, view.table8);
          sum[e] += value * value;
        }
      }
    }
    for (int64_t e = 0; e < here; ++e) out[start + e] = sum[e];
  }
}

template <Dtype S>
inline void square_sums_as(const ItemView& view, int64_t d, int64_t first, int64_t count, double* out, bool rounded) {
  if (view.stride_n == 1 && view.stride_d != 1) {
    square_sums_across<S>(view, d, first, count, out, rounded);
  } else {
    for (int64_t e = 0; e < count; ++e) out[e] = square_sum<S>(view, first + e, d, rounded);
  }
}

inline void square_sums(const ItemView& view, Dtype dtype, int64_t d, int64_t first, int64_t count, double* exact,
                        double* rounded) {
  with_dtype(dtype, [&](auto tag) {
    constexpr Dtype S = decltype(tag)::value;
    square_sums_as<S>(view, d, first, count, exact, false);
    if (rounded != nullptr) square_sums_as<S>(view, d, first, count, rounded, true);
  });
}

}  // namespace
}  // namespace orthofast
