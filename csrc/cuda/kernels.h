// Entry points of the compiled kernels, as functions the launcher can call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/tables.h"

namespace orthofast {
namespace cuda {

using FoldKernel = void (*)(const CallTables, int64_t, int64_t, bool);

// One table per operand dtype, each in a file of its own so that they compile side by side.
// want: kAbsSum; with moments and maximum; or everything but the histogram.
FoldKernel fold_kernel_bf16(bool large, bool mn_major, int want);
FoldKernel fold_kernel_f16(bool large, bool mn_major, int want);

}  // namespace cuda
}  // namespace orthofast
