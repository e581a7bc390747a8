// The fold of bf16 operands.
#include "cuda/fold_table.cuh"

namespace orthofast {
namespace cuda {

FoldKernel fold_kernel_bf16(bool large, bool mn_major, int want) { return fold_in<true>(large, mn_major, want); }

}  // namespace cuda
}  // namespace orthofast
