// The fold for AVX-512 with bfloat16 products: two exact products a lane, summed in float32.
#include "arithmetic_avx512.h"
#include "fold_block.h"
#include "gradient_block.h"
#include "square_sums.h"

namespace orthofast {
namespace {

// A packed element is the bfloat16 pair (k, k+1); the instruction reads subnormals as zero.
struct Bf16 {
  using Elem = uint32_t;
  using Acc = float;
  using V = Vec<float, 16>;
  using Pairs = Vec<uint32_t, 16>;
  static constexpr int kStep = 2, kLanes = 16, kRows = 8, kColumns = 3, kPanel = 48;

  static V load(const Elem* p) { return load_as<V>(p); }
  static V multiply_add(V acc, const Elem* a, V b) {
    return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)), (__m512bh)b);
  }

  template <Dtype S>
  static Elem read(const ItemView& view, int64_t row, int64_t k, int64_t d) {
    const uint32_t even = bf16_of_f32(static_cast<float>(read_scaled<S>(view, row, k, d)));
    const uint32_t odd = bf16_of_f32(static_cast<float>(read_scaled<S>(view, row, k + 1, d)));
    return even | (odd << 16);
  }

  // 32 elements of one vector -> 16 pairs
  template <Dtype S>
  static V along(const typename Stored<S>::Type* p, const float* table) {
    if constexpr (S == Dtype::bf16) {
      return load_as<V>(p);
    } else {
      return (V)_mm512_cvtne2ps_pbh((__m512)F32::widen<narrow<S>()>(cast<S>(p) + 16, table),
                                    (__m512)F32::widen<narrow<S>()>(cast<S>(p), table));
    }
  }

  // elements k (p) and k + 1 (q) of 16 vectors -> 16 pairs
  template <Dtype S>
  static V across(const typename Stored<S>::Type* p, const typename Stored<S>::Type* q, const float* table) {
    return (V)(halves<S>(p, table) | (halves<S>(q, table) << 16));
  }

 private:
  // float64 never comes here; naming float32 in its place keeps the template well formed
  template <Dtype S>
  static constexpr Dtype narrow() {
    return S == Dtype::f64 ? Dtype::f32 : S;
  }
  template <Dtype S>
  static const typename Stored<narrow<S>()>::Type* cast(const typename Stored<S>::Type* p) {
    return reinterpret_cast<const typename Stored<narrow<S>()>::Type*>(p);
  }
  template <Dtype S>
  static Pairs halves(const typename Stored<S>::Type* p, const float* table) {
    if constexpr (S == Dtype::bf16) {
      return __builtin_convertvector(load_as<Vec<uint16_t, 16>>(p), Pairs);
    } else {
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)F32::widen<narrow<S>()>(cast<S>(p), table));
      return (Pairs)_mm512_cvtepu16_epi32((__m256i)rounded);
    }
  }
};

constexpr size_t kWorkspace = workspace_bytes<F64>() > workspace_bytes<Bf16>() ? workspace_bytes<F64>() : workspace_bytes<Bf16>();
constexpr KernelTable kTable{"avx512bf16",    square_sums,      fold_block<F32>, fold_block<F64>,
                             fold_block<Bf16>, spin<F32>, spin<Bf16>,      kWorkspace,
                             gradient_table<F32, F64>()};

}  // namespace

const KernelTable* kernels_avx512bf16() { return &kTable; }

}  // namespace orthofast
