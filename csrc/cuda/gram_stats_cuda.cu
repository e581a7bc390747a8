// Launches of one call: tables, lengths, work list, folds, sums; a second, conditional round where operands are rounded.
#include "cuda/gram_stats_cuda.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/layout.h"
#include "cuda/plan.h"
#include "cuda/prepare.cuh"
#include "cuda/settle.cuh"

namespace orthofast {
namespace {

using namespace cuda;

constexpr int kMostBlocks = 1024;  // of a grid-stride launch beside the fold
constexpr int kPrepareBlocks = 8;  // blocks of the length kernel per processor

void checked(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported here, once
  throw Failure{std::string(what) + " failed: " + cudaGetErrorString(status)};
}

void launched(const char* what) { checked(cudaGetLastError(), what); }

// Makes `device` current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    checked(cudaGetDevice(&before_), "asking for the current CUDA device");
    changed_ = before_ != device;
    if (changed_) checked(cudaSetDevice(device), "choosing the CUDA device");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <int kWords>
void upload_pieces(const std::vector<uint4>& words, uint4* to, cudaStream_t stream) {
  for (size_t at = 0; at < words.size(); at += kWords) {
    Piece<kWords> piece{};
    const size_t count = std::min<size_t>(kWords, words.size() - at);
    std::copy_n(words.data() + at, count, piece.words);
    upload<kWords><<<1, kSettleThreads, 0, stream>>>(piece, to + at, static_cast<int>(count));
    launched("sending tables to the device");
  }
}

void send_tables(const Plan& plan, uintptr_t workspace, cudaStream_t stream) {
  std::vector<uint4> words(static_cast<size_t>(block_count(plan.table_bytes, sizeof(uint4))));
  auto* bytes = reinterpret_cast<unsigned char*>(words.data());
  const auto place = [&](const void* table) { return bytes + (reinterpret_cast<uintptr_t>(table) - workspace); };
  std::memcpy(place(plan.tables.sides), plan.sides.data(), plan.sides.size() * sizeof(SideTable));
  std::memcpy(place(plan.tables.requests), plan.requests.data(), plan.requests.size() * sizeof(RequestTable));
  for (size_t s = 0; s < plan.maps.size(); ++s) encode_map(plan.maps[s], place(plan.tables.maps) + s * kMapBytes);
  auto* to = reinterpret_cast<uint4*>(workspace);
  // arguments of a kernel: 4 KiB everywhere, 32 KiB since CUDA 12.1
  constexpr int kSmallPiece = 4000 / sizeof(uint4), kLargePiece = 32000 / sizeof(uint4);
  if (words.size() <= kSmallPiece) {
    upload_pieces<kSmallPiece>(words, to, stream);
  } else {
    upload_pieces<kLargePiece>(words, to, stream);
  }
}

void fold_all(const Plan& plan, int processors, bool again, cudaStream_t stream) {
  for (const Launch& launch : plan.launches) {
    const FoldKernel kernel = launch.bf16 ? fold_kernel_bf16(launch.large, launch.mn_major, plan.want)
                                          : fold_kernel_f16(launch.large, launch.mn_major, plan.want);
    const int shared = launch.large ? LargeTile::kSharedBytes : SmallTile::kSharedBytes;
    const int cluster = launch.large ? LargeTile::kCluster : SmallTile::kCluster;
    const auto* entry = reinterpret_cast<const void*>(kernel);
    checked(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "reserving shared memory");
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    int64_t clusters = processors;
    if (cluster > 1) {
      // partitions of a device may not place a pair on every two processors
      config.gridDim = dim3(static_cast<unsigned>(cluster));
      int most = 0;
      checked(cudaOccupancyMaxActiveClusters(&most, entry, &config), "asking how many clusters fit");
      if (most < 1) throw Failure{"this CUDA device has no room for a cluster of two blocks"};
      clusters = most;
    }
    clusters = std::min(clusters, launch.last - launch.first);
    config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
    checked(cudaLaunchKernelEx(&config, kernel, plan.tables, launch.first, launch.last, again), "launching the fold");
  }
}

unsigned grid_for(int64_t work) {
  return static_cast<unsigned>(std::min<int64_t>(kMostBlocks, std::max<int64_t>(1, block_count(work, kSettleThreads))));
}

}  // namespace

std::string cuda_lack(int device) {
  int devices = 0;
  cudaError_t status = cudaGetDeviceCount(&devices);
  int major = 0, minor = 0;
  if (status == cudaSuccess && device >= devices) {
    return "there is no CUDA device " + std::to_string(device) + ", only " + std::to_string(devices);
  }
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string("CUDA cannot be used here: ") + cudaGetErrorString(status);
  }
  if (major != 9 || minor != 0) {
    return "it is compiled for compute capability 9.0 (H100, H200), the device has " + std::to_string(major) + "." +
           std::to_string(minor);
  }
  return "";
}

int64_t cuda_workspace_bytes(const GramArgs* requests, int64_t count, int processors) {
  return make_plan(requests, count, processors, 0).bytes;
}

void gram_stats_cuda(const GramArgs* requests, int64_t count, uintptr_t workspace, int64_t workspace_bytes, int processors,
                     int device, uintptr_t stream_handle) {
  if (count < 1) return;
  if (workspace % 256 != 0) throw std::invalid_argument("the workspace needs an address that is a multiple of 256");
  const Plan plan = make_plan(requests, count, processors, workspace);
  if (plan.bytes > workspace_bytes) {
    throw std::invalid_argument("the workspace needs " + std::to_string(plan.bytes) + " bytes, got " +
                                std::to_string(workspace_bytes));
  }
  const DeviceGuard guard(device);
  auto* stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const CallTables& tables = plan.tables;
  send_tables(plan, workspace, stream);
  expand<<<grid_for(std::max(tables.entry_count, tables.problem_count)), kSettleThreads, 0, stream>>>(tables);
  launched("writing the work list");
  for (int round = 0; round < (plan.rounds ? 2 : 1); ++round) {
    const bool again = round == 1;
    const int64_t groups = std::min<int64_t>(tables.group_count, int64_t{kPrepareBlocks} * processors);
    prepare<<<static_cast<unsigned>(groups), kPrepareThreads, 0, stream>>>(tables, again);
    launched("measuring the vectors");
    fold_all(plan, processors, again, stream);
    finish<<<static_cast<unsigned>(tables.problem_count), kSettleThreads, 0, stream>>>(tables, again);
    launched("joining the sums");
  }
  if (plan.row_sums) {
    const dim3 grid(grid_for(plan.most_vectors), static_cast<unsigned>(tables.side_count));
    finish_vectors<<<grid, kSettleThreads, 0, stream>>>(tables);
    launched("joining the sums of each vector");
  }
}

}  // namespace orthofast
