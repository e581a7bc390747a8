// The fold of f16 operands.
#include "cuda/fold_table.cuh"

namespace orthofast {
namespace cuda {

FoldKernel fold_kernel_f16(bool large, bool mn_major, int want) { return fold_in<false>(large, mn_major, want); }

}  // namespace cuda
}  // namespace orthofast
