// Geometry of the Hopper fold: tiles, stages, shared-memory layout, operand descriptors, accumulator fragments.
//
// Plain functions for host and device, so that the host compiler tests what the tensor cores will read.
#pragma once

#include <cstdint>

#include "core/fold.h"

namespace orthofast {
namespace cuda {

constexpr int kBoxVectors = 128;              // vectors of one operand box, rows of one CTA's tile
constexpr int kStepK = 64;                    // 16-bit elements of a k-step: one 128-byte swizzled row
constexpr int kRowBytes = 2 * kStepK;
constexpr int kBoxBytes = kBoxVectors * kRowBytes;
constexpr int kChunkVectors = 64;             // contiguous vectors of an MN-major box
constexpr int kChunkBytes = kChunkVectors * kRowBytes;
constexpr int kMmaRows = 64, kMmaK = 16;      // one wgmma
constexpr int kConsumerGroups = 2;            // warpgroups that multiply, 64 rows each
constexpr int kConsumerWarps = 4 * kConsumerGroups;
constexpr int kThreads = 128 * (1 + kConsumerGroups);
constexpr int kSharedLimit = 232448;          // bytes a block may ask for on compute capability 9.0
constexpr int kPad = 256;                     // inverse lengths are padded with zeros to whole tiles

// A cluster of kCluster CTAs folds a square tile of kEdge x kEdge pairs; CTA r owns its rows r*128 .. r*128+127 and
// fetches columns r*128 .. of the k-step for all CTAs.
template <int kClusterSize>
struct TileShape {
  static constexpr int kCluster = kClusterSize;
  static constexpr int kEdge = kBoxVectors * kCluster;
  static constexpr int kColumns = kEdge;
  static constexpr int kStages = kCluster == 2 ? 4 : 6;
  static constexpr int kStageBytes = kBoxBytes * (1 + kCluster);  // own rows, and the columns of every CTA
  static constexpr int kAccumulators = kMmaRows * kColumns / 128;
  static constexpr int kEmptyArrivals = kCluster * kConsumerWarps;
  static constexpr int kColumnSumBytes = kConsumerWarps * kColumns * 4;
  static constexpr int kBarrierBytes = 2 * 8 * kStages;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kColumnSumBytes + kBarrierBytes;
  static_assert(kSharedBytes <= kSharedLimit, "stages do not fit");
};
using LargeTile = TileShape<2>;
using SmallTile = TileShape<1>;

// Position in the ring of stages: which slot, and the parity of its present round.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  template <int kStages>
  ORTHOFAST_HOST_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Parity the producer waits for: the round before its own; on a fresh barrier that is already over.
ORTHOFAST_HOST_DEVICE inline uint32_t producer_parity(const Ring& ring) { return ring.phase ^ 1; }
ORTHOFAST_HOST_DEVICE inline uint32_t consumer_parity(const Ring& ring) { return ring.phase; }

// 128-byte swizzle of the copy engine and of wgmma: address bits 4-6 are xored with bits 7-9.
ORTHOFAST_HOST_DEVICE inline uint32_t swizzle128(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// Byte of element (vector, k) in one operand, as boxes arrive: vectors outer, 64 k in a row.
ORTHOFAST_HOST_DEVICE inline uint32_t k_major_byte(int vector, int k) {
  return swizzle128(static_cast<uint32_t>(vector * kRowBytes + 2 * k));
}

// The same where vectors are contiguous: chunks of 64 vectors, k outer, 64 vectors in a row.
ORTHOFAST_HOST_DEVICE inline uint32_t mn_major_byte(int vector, int k) {
  const int chunk = vector / kChunkVectors, within = vector % kChunkVectors;
  return swizzle128(static_cast<uint32_t>(chunk * kChunkBytes + k * kRowBytes + 2 * within));
}

// wgmma matrix descriptor, all fields in units of 16 bytes:
// bits 0-13 start, 16-29 leading offset, 32-45 stride offset, 62-63 swizzle (1: 128 bytes).
ORTHOFAST_HOST_DEVICE inline uint64_t operand_descriptor(uint32_t address, bool mn_major) {
  // leading: next 64 vectors (MN-major), unused under K-major swizzle; stride: next 8 rows of 128 bytes
  const uint64_t leading = mn_major ? kChunkBytes >> 4 : 1;
  const uint64_t stride = (8 * kRowBytes) >> 4;
  return (static_cast<uint64_t>(address >> 4) & 0x3fff) | leading << 16 | stride << 32 | uint64_t{1} << 62;
}

// Step of the descriptor's start to the next 16 k, in units of 16 bytes.
ORTHOFAST_HOST_DEVICE constexpr uint64_t descriptor_step(bool mn_major) {
  return mn_major ? (kMmaK * kRowBytes) >> 4 : (2 * kMmaK) >> 4;
}

// First byte of a warpgroup's 64 rows within the operand of 128 rows: the same for both layouts.
ORTHOFAST_HOST_DEVICE constexpr uint32_t group_offset(int group) {
  return static_cast<uint32_t>(group * kMmaRows * kRowBytes);
}

// Accumulator register r of thread t of a warpgroup -> position in its 64-row tile.
ORTHOFAST_HOST_DEVICE inline int fragment_row(int thread, int r) {
  return 16 * (thread / 32) + thread % 32 / 4 + 8 * (r / 2 % 2);
}
ORTHOFAST_HOST_DEVICE inline int fragment_column(int thread, int r) { return 8 * (r / 4) + 2 * (thread % 4) + r % 2; }

// Column sums: a lane holds 8 columns at a time (4 groups of 8 columns, 2 each); three halvings over the 8 lanes of
// equal lane % 4 leave one column per lane. This is the column (of 32) that stays.
ORTHOFAST_HOST_DEVICE inline int kept_column(int lane) {
  const int value = 4 * (lane / 16 % 2) + 2 * (lane / 8 % 2) + lane / 4 % 2;  // index among the lane's 8
  return 8 * (value / 2) + 2 * (lane % 4) + value % 2;
}

}  // namespace cuda
}  // namespace orthofast
