// The fold for AVX-512 (F, BW, VL, DQ).
#include "arithmetic_avx512.h"
#include "fold_block.h"
#include "gradient_block.h"
#include "square_sums.h"

namespace orthofast {
namespace {

constexpr size_t kWorkspace = workspace_bytes<F32>() > workspace_bytes<F64>() ? workspace_bytes<F32>() : workspace_bytes<F64>();
constexpr KernelTable kTable{"avx512", square_sums, fold_block<F32>, fold_block<F64>, nullptr, spin<F32>, nullptr, kWorkspace,
                             gradient_table<F32, F64>()};

}  // namespace

const KernelTable* kernels_avx512() { return &kTable; }

}  // namespace orthofast
