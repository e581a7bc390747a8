// The fold for any processor: 128-bit vectors, no instruction-set flags.
#include "fold_block.h"
#include "gradient_block.h"
#include "square_sums.h"

namespace orthofast {
namespace {

using F32 = Plain<float, 4, 4, 2>;   // 8 accumulators: fits 16 registers without a fused multiply-add
using F64 = Plain<double, 2, 4, 2>;

constexpr size_t kWorkspace = workspace_bytes<F32>() > workspace_bytes<F64>() ? workspace_bytes<F32>() : workspace_bytes<F64>();
constexpr KernelTable kTable{"portable", square_sums, fold_block<F32>, fold_block<F64>, nullptr, spin<F32>, nullptr, kWorkspace,
                             gradient_table<F32, F64>()};

}  // namespace

const KernelTable* kernels_portable() { return &kTable; }

}  // namespace orthofast
