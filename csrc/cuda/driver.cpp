// Tensor maps through the driver's own encoder, found at run time.
#include "cuda/driver.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

namespace orthofast {
namespace cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess) {
    cudaGetLastError();  // it must not surface in a later, unrelated call
    throw Failure{std::string("the CUDA driver cannot be asked for tensor maps: ") + cudaGetErrorString(status)};
  }
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
    throw Failure{"the CUDA driver has no tensor maps; install driver 525 or newer"};
  }
  return reinterpret_cast<Encode>(entry);
}

}  // namespace

void encode_map(const MapPlan& plan, unsigned char* to) {
  static const Encode encode = find_encoder();
  const cuuint64_t size[3] = {plan.size[0], plan.size[1], plan.size[2]};
  const cuuint64_t stride[2] = {plan.stride[0], plan.stride[1]};
  const cuuint32_t box[3] = {plan.box[0], plan.box[1], plan.box[2]}, step[3] = {1, 1, 1};
  alignas(64) CUtensorMap map;
  static_assert(sizeof(map) == kMapBytes, "tensor maps have 128 bytes");
  const CUresult status =
      encode(&map, plan.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
             const_cast<void*>(plan.address), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw Failure{"the CUDA driver refused a tensor map of sizes (" + std::to_string(size[0]) + ", " + std::to_string(size[1]) +
                  ", " + std::to_string(size[2]) + ") and strides of (" + std::to_string(stride[0]) + ", " +
                  std::to_string(stride[1]) + ") bytes with error " + std::to_string(static_cast<int>(status))};
  }
  std::memcpy(to, &map, sizeof(map));
}

}  // namespace cuda
}  // namespace orthofast
