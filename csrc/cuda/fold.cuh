// The persistent fold: one warp feeds stages through the copy engine, two warpgroups multiply and fold what arrives.
//
// A cluster takes entries c, c + C, c + 2C ... of the work list; its CTAs take the same entries and the same k-steps, so
// every box that one of them sends to all is awaited by all. Per stage and CTA
//   full   1 arrival (the own producer, announcing kStageBytes) + kStageBytes from the own and the peer's copies
//   empty  one arrival from each consumer warp of every CTA: a slot is overwritten in all CTAs or in none
// A peer's bytes may be counted before the own producer announces them: the phase cannot end without its arrival, and no
// peer runs a round ahead, since it waits for this CTA's consumers.
#pragma once

#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/hopper.cuh"
#include "cuda/layout.h"
#include "cuda/tables.h"
#include "cuda/wgmma.cuh"

namespace orthofast {
namespace cuda {

constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // (40 + 2 * 232) * 128 of 65536

// Addresses in shared memory, all of one CTA.
struct SharedPlan {
  uint32_t stages, full, empty;
  float* column_sums;
};

template <typename Tile>
__device__ __forceinline__ SharedPlan plan_shared(unsigned char* shared) {
  // the swizzle pattern repeats every 1024 bytes, at the same addresses in every CTA of a cluster
  unsigned char* aligned = shared + ((1024 - (shared_address(shared) & 1023)) & 1023);
  unsigned char* sums = aligned + Tile::kStages * Tile::kStageBytes;
  const uint32_t barriers = shared_address(sums + Tile::kColumnSumBytes);
  return SharedPlan{shared_address(aligned), barriers, barriers + 8 * Tile::kStages, reinterpret_cast<float*>(sums)};
}

template <bool kMnMajor>
__device__ __forceinline__ void copy_operand(const void* map, uint32_t to, uint32_t barrier, int vector, int k, int item) {
  if constexpr (kMnMajor) {
#pragma unroll
    for (int c = 0; c < kBoxVectors / kChunkVectors; ++c) {
      copy_box(map, to + c * kChunkBytes, barrier, vector + c * kChunkVectors, k, item);
    }
  } else {
    copy_box(map, to, barrier, k, vector, item);
  }
}

template <bool kMnMajor>
__device__ __forceinline__ void copy_operand_to_all(const void* map, uint32_t to, uint32_t barrier, int vector, int k,
                                                    int item, uint16_t mask) {
  if constexpr (kMnMajor) {
#pragma unroll
    for (int c = 0; c < kBoxVectors / kChunkVectors; ++c) {
      copy_box_multicast(map, to + c * kChunkBytes, barrier, vector + c * kChunkVectors, k, item, mask);
    }
  } else {
    copy_box_multicast(map, to, barrier, k, vector, item, mask);
  }
}

// Operand parts of product `part`: 0 high x low, 1 low x high, 2 high x high; a single product is of the high parts.
__device__ __forceinline__ int x_part(int parts, int part) { return parts == 3 && part == 1; }
__device__ __forceinline__ int y_part(int parts, int part) { return parts == 3 && part == 0; }

template <typename Tile, bool kMnMajor>
__device__ __forceinline__ void produce(const CallTables& call, const SharedPlan& shared, int64_t first, int64_t last,
                                        int64_t start, int64_t stride, int rank, bool again) {
  Ring ring;
  int32_t present = -1;
#pragma unroll 1
  for (int64_t entry = first + start; entry < last; entry += stride) {
    const WorkEntry work = call.entries[entry];
    if (again && call.redo[work.problem] == 0) continue;
    const Problem& problem = call.problems[work.problem];
    const BlockPair tile = unpack_tiles(work.tiles);
    const unsigned char* map_x = call.maps + 128 * static_cast<int64_t>(problem.map_x);
    const unsigned char* map_y = call.maps + 128 * static_cast<int64_t>(problem.map_y);
    if (problem.request != present) {
      present = problem.request;
      acquire_tensor_map(map_x);
      acquire_tensor_map(map_y);
    }
    const int row = static_cast<int>(tile.row) * Tile::kEdge + rank * kBoxVectors;
    const int col = static_cast<int>(tile.col) * Tile::kEdge + rank * kBoxVectors;
    const int parts = again ? 3 : problem.parts, steps = problem.steps;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const int item_x = problem.item + (x_part(parts, part) ? problem.items : 0);
      const int item_y = problem.item + (y_part(parts, part) ? problem.items : 0);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const uint32_t full = shared.full + 8 * ring.stage;
        const uint32_t x = shared.stages + ring.stage * Tile::kStageBytes;
        const uint32_t y = x + (1 + rank) * kBoxBytes;
        barrier_wait(shared.empty + 8 * ring.stage, producer_parity(ring));
        barrier_expect(full, Tile::kStageBytes);
        copy_operand<kMnMajor>(map_x, x, full, row, step * kStepK, item_x);
        if constexpr (Tile::kCluster == 1) {
          copy_operand<kMnMajor>(map_y, y, full, col, step * kStepK, item_y);
        } else {
          copy_operand_to_all<kMnMajor>(map_y, y, full, col, step * kStepK, item_y, (1 << Tile::kCluster) - 1);
        }
        ring.advance<Tile::kStages>();
      }
    }
  }
}

// One arrival per warp at the slot's empty barrier in every CTA.
template <typename Tile>
__device__ __forceinline__ void release(const SharedPlan& shared, int stage, int lane) {
  if (lane < Tile::kCluster) barrier_arrive(shared.empty + 8 * stage, lane);
}

template <typename Tile, bool kBf16, bool kMnMajor, int kWant>
__device__ __forceinline__ void consume(const CallTables& call, const SharedPlan& shared, int64_t first, int64_t last,
                                        int64_t start, int64_t stride, int rank, bool again) {
  const int thread = static_cast<int>(threadIdx.x) - 128, warp = thread / 32, lane = thread % 32, group = warp / 4;
  float acc[Tile::kAccumulators];
  Ring ring;
#pragma unroll 1
  for (int64_t entry = first + start; entry < last; entry += stride) {
    const WorkEntry work = call.entries[entry];
    if (again && call.redo[work.problem] == 0) continue;
    const Problem& problem = call.problems[work.problem];
    const int parts = again ? 3 : problem.parts, steps = problem.steps;
#pragma unroll
    for (int r = 0; r < Tile::kAccumulators; ++r) acc[r] = 0;
    // low parts carry 2^11 times their value: one rescaling between the mixed products and the last
    int rescale = parts == 3 ? 2 * steps : -1;
    int held = -1;  // stage whose products are still running
#pragma unroll 1
    for (int step = 0; step < parts * steps; ++step) {
      if (step == rescale) {
        wgmma_wait<0>();
        pin(acc);
#pragma unroll
        for (int r = 0; r < Tile::kAccumulators; ++r) acc[r] *= 0x1p-11f;
      }
      barrier_wait(shared.full + 8 * ring.stage, consumer_parity(ring));
      const uint32_t x = shared.stages + ring.stage * Tile::kStageBytes;
      const uint64_t a = operand_descriptor(x + group_offset(group), kMnMajor);
      const uint64_t b = operand_descriptor(x + kBoxBytes, kMnMajor);
      pin(acc);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStepK / kMmaK; ++k) {
        multiply<kBf16, kMnMajor>(acc, a + k * descriptor_step(kMnMajor), b + k * descriptor_step(kMnMajor), 1);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (held >= 0) release<Tile>(shared, held, lane);
      held = ring.stage;
      ring.advance<Tile::kStages>();
    }
    wgmma_wait<0>();
    pin(acc);
    release<Tile>(shared, held, lane);

    const BlockPair tile = unpack_tiles(work.tiles);
    const int row_tile = static_cast<int>(tile.row) * Tile::kCluster + rank;
    const Place at{tile.row * Tile::kEdge + rank * kBoxVectors, tile.col * Tile::kEdge,
                   slot_of(entry, rank, warp),
                   row_tile, static_cast<int>(tile.col), thread, warp};
    if (problem.within && tile.row == tile.col) {
      fold_fragment<Tile, kWant, true>(acc, problem, call, at, shared.column_sums);
    } else {
      fold_fragment<Tile, kWant, false>(acc, problem, call, at, shared.column_sums);
    }
  }
}

// Entries first .. last - 1 of the work list. `again`: only problems marked for three products.
template <typename Tile, bool kBf16, bool kMnMajor, int kWant>
__global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(Tile::kCluster, 1, 1)
    fold(const __grid_constant__ CallTables call, int64_t first, int64_t last, bool again) {
  extern __shared__ unsigned char shared_bytes[];
  const SharedPlan shared = plan_shared<Tile>(shared_bytes);
  const int rank = Tile::kCluster == 1 ? 0 : static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::kStages; ++s) {
      barrier_init(shared.full + 8 * s, 1);
      barrier_init(shared.empty + 8 * s, Tile::kEmptyArrivals);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if constexpr (Tile::kCluster > 1) cluster_sync();  // no copy before every CTA's barriers stand
  const int64_t start = blockIdx.x / Tile::kCluster, stride = gridDim.x / Tile::kCluster;
  if (threadIdx.x < 128) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<Tile, kMnMajor>(call, shared, first, last, start, stride, rank, again);
  } else {
    take_registers<kConsumerRegisters>();
    consume<Tile, kBf16, kMnMajor, kWant>(call, shared, first, last, start, stride, rank, again);
  }
  // peers still arrive at this CTA's barriers: none leaves before all are done
  if constexpr (Tile::kCluster > 1) {
    __syncwarp();
    cluster_sync();
  }
}

}  // namespace cuda
}  // namespace orthofast
