// float32 and float64 arithmetic for AVX-512: an 8 x 48 (8 x 24) register block.
#pragma once

#include <immintrin.h>

#include "arithmetic.h"

namespace orthofast {
namespace {

// one packed copy serves both operands: 48 = 6 * 8
struct F32 : Plain<float, 16, 8, 3> {
  template <Dtype S>
  static V widen(const typename Stored<S>::Type* p, const float* table) {
    if constexpr (S == Dtype::f16) {
      return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    } else if constexpr (Stored<S>::is8) {
      const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return (V)_mm512_i32gather_ps(index, table, 4);
    } else {
      return Plain::convert<S>(p, table);
    }
  }
  template <Dtype S>
  static V along(const typename Stored<S>::Type* p, const float* table) {
    return widen<S>(p, table);
  }
  template <Dtype S>
  static V across(const typename Stored<S>::Type* p, const typename Stored<S>::Type*, const float* table) {
    return widen<S>(p, table);
  }
};
using F64 = Plain<double, 8, 8, 3>;

}  // namespace
}  // namespace orthofast
