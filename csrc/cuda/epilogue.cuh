// A finished tile in registers becomes partial sums: one slot per warp, per tile row and per tile column.
#pragma once

#include <cstdint>

#include "cuda/hopper.cuh"
#include "cuda/layout.h"
#include "cuda/tables.h"

namespace orthofast {
namespace cuda {

// Where one CTA stands: its tile's first vectors, and the warp and lane that ask.
struct Place {
  int64_t row, col;      // first vectors of this CTA's 128 rows and of the tile's columns
  int64_t slot;          // of this warp's partials
  int row_tile, col_tile;  // row tiles count CTAs
  int thread, warp;      // within the consumers: 0 .. 255, 0 .. 7
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    Best other{__shfl_xor_sync(0xffffffffu, best.value, step), __shfl_xor_sync(0xffffffffu, best.i, step),
               __shfl_xor_sync(0xffffffffu, best.j, step)};
    if (ranks_before(other, best)) best = other;
  }
  return best;
}

// Sums of 8 columns over the warp's 16 rows: lanes of equal lane % 4 hold the same columns and halve them three times.
__device__ __forceinline__ float column_sum(float (&value)[8], int lane) {
#pragma unroll
  for (int width = 4, step = 16; width > 0; width >>= 1, step >>= 1) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float give = upper ? value[i] : value[i + width];
      const float keep = upper ? value[i + width] : value[i];
      value[i] = keep + __shfl_xor_sync(0xffffffffu, give, step);
    }
  }
  return value[0];
}

// kWant: bits of Want. kMasked: only pairs with column > row count.
template <typename Tile, int kWant, bool kMasked>
__device__ __forceinline__ void fold_fragment(const float (&acc)[Tile::kAccumulators], const Problem& problem,
                                              const CallTables& call, const Place& at, float* column_sums) {
  constexpr bool kMoments = (kWant & (kSqSum | kSum)) != 0, kMax = (kWant & kAbsMax) != 0, kRows = (kWant & kRowAbs) != 0;
  const int lane = at.thread % 32;
  const int64_t row = at.row + 64 * (at.warp / 4) + fragment_row(at.thread % 128, 0);
  const float scale[2] = {problem.inverse_x[row], problem.inverse_x[row + 8]};
  const float* inverse = problem.inverse_y + at.col + fragment_column(lane, 0);
  // in a masked tile: columns of the tile that lie beyond this row start here
  const int beyond = static_cast<int>(row - at.col) - fragment_column(lane, 0);

  float size[2] = {0, 0}, square[2] = {0, 0}, signed_sum[2] = {0, 0};
  float most[2] = {-1, -1};
  int where[2] = {0, 0};
#pragma unroll
  for (int block = 0; block < Tile::kColumns / 32; ++block) {
    float column[8];
#pragma unroll
    for (int j = 4 * block; j < 4 * block + 4; ++j) {
      const float2 both = *reinterpret_cast<const float2*>(inverse + 8 * j);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float scale_y = e == 0 ? both.x : both.y;
        if constexpr (kRows) column[2 * (j % 4) + e] = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool counts = !kMasked || 8 * j + e > beyond + 8 * h;
          const float t = counts ? acc[4 * j + 2 * h + e] * scale_y : 0.0f;
          size[h] += fabsf(t);
          if constexpr (kMoments) {
            square[h] = fmaf(t, t, square[h]);
            signed_sum[h] += t;
          }
          if constexpr (kRows) column[2 * (j % 4) + e] += fabsf(t) * scale[h];
          if constexpr (kMax) {
            // a vector that takes part has a positive inverse
            const float value = counts && scale_y != 0 && scale[h] != 0 ? fabsf(t) * scale[h] : -1.0f;
            if (value > most[h]) {
              most[h] = value;
              where[h] = 8 * j + e;
            }
          }
        }
      }
    }
    if constexpr (kRows) {
      column_sums[at.warp * Tile::kColumns + 32 * block + kept_column(lane)] = column_sum(column, lane);
    }
  }

  if constexpr ((kWant & kAbsSum) != 0) {
    const float total = warp_sum(size[0] * scale[0] + size[1] * scale[1]);
    if (lane == 0) call.abs_sum[at.slot] = total;
  }
  if constexpr (kMoments) {
    const float squares = warp_sum(square[0] * scale[0] * scale[0] + square[1] * scale[1] * scale[1]);
    const float sums = warp_sum(signed_sum[0] * scale[0] + signed_sum[1] * scale[1]);
    if (lane == 0) {
      call.sq_sum[at.slot] = squares;
      call.sum[at.slot] = sums;
    }
  }
  if constexpr (kMax) {
    const int first = static_cast<int>(at.col) + fragment_column(lane, 0);
    Best best{most[0], static_cast<int32_t>(row), first + where[0]};
    const Best second{most[1], static_cast<int32_t>(row) + 8, first + where[1]};
    best = warp_best(ranks_before(second, best) ? second : best);
    if (lane == 0) call.best[at.slot] = best;
  }
  if constexpr (kRows) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = size[h] * scale[h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      // the quad's four lanes hold the same row
      if (lane % 4 == 0) {
        problem.row_slots[at.col_tile * problem.padded_x + row + 8 * h] = sum;
      }
    }
    consumers_sync(32 * kConsumerWarps);
    for (int c = at.thread; c < Tile::kColumns; c += 32 * kConsumerWarps) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kConsumerWarps; ++w) sum += column_sums[w * Tile::kColumns + c];
      problem.col_slots[at.row_tile * problem.padded_y + at.col + c] = sum;
    }
    consumers_sync(32 * kConsumerWarps);  // before the next tile writes column_sums
  }
}

}  // namespace cuda
}  // namespace orthofast
