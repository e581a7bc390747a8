// The fold for AVX2 with fused multiply-add and half-precision conversion.
#include <immintrin.h>

#include "fold_block.h"
#include "gradient_block.h"
#include "square_sums.h"

namespace orthofast {
namespace {

// 12 accumulators, 3 columns and a broadcast fill the 16 registers
struct F32 : Plain<float, 8, 4, 3> {
  template <Dtype S>
  static V halves(const typename Stored<S>::Type* p, const float* table) {
    if constexpr (S == Dtype::f16) {
      return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    } else {
      return Plain::convert<S>(p, table);
    }
  }
  template <Dtype S>
  static V along(const typename Stored<S>::Type* p, const float* table) {
    return halves<S>(p, table);
  }
  template <Dtype S>
  static V across(const typename Stored<S>::Type* p, const typename Stored<S>::Type*, const float* table) {
    return halves<S>(p, table);
  }
};
using F64 = Plain<double, 4, 4, 3>;

constexpr size_t kWorkspace = workspace_bytes<F32>() > workspace_bytes<F64>() ? workspace_bytes<F32>() : workspace_bytes<F64>();
constexpr KernelTable kTable{"avx2", square_sums, fold_block<F32>, fold_block<F64>, nullptr, spin<F32>, nullptr, kWorkspace,
                             gradient_table<F32, F64>()};

}  // namespace

const KernelTable* kernels_avx2() { return &kTable; }

}  // namespace orthofast
