// Tables of one call as host and device see them: requests, problems, work list, partials.
#pragma once

#include <cstdint>

#include "core/gram_stats.h"
#include "core/schedule.h"

namespace orthofast {
namespace cuda {

// As stored; fp16 that says the same (fp8); fp16, rounded; two fp16, a high and a low part.
enum class Operand : int32_t { exact = 0, converted, rounded, split };

// One side of one request.
struct SideTable {
  const void* data;
  int64_t n, padded;                      // vectors; the same rounded up to whole tiles
  int64_t stride_b, stride_n, stride_d;   // elements
  int64_t d, b;
  double* norm_sq;                        // (b, n) out
  double* row_abs;                        // (b, n) out or null
  float* inverse;                         // (b, padded)
  void* operand;                          // fp16 (1 or 2, b, n, pitch) or (.., d, pitch); null if exact
  int64_t pitch;                          // elements, a multiple of 8
  int64_t first_group;                    // of vectors, over all sides of the call
  int64_t first_problem;
  int32_t map;                            // index of its tensor map
  Dtype dtype;
  Operand kind;
  int32_t mn_major, wide, normalize;      // wide: 16-byte loads along the contiguous axis are aligned
};

// One request: b problems of the same shape.
struct RequestTable {
  int64_t b, d;
  int64_t first_problem, first_entry, entries;  // entries: of one problem
  int64_t row_tiles, col_tiles;
  double* sums;     // (b, 5)
  int64_t* counts;  // (b, 5)
  float* row_slots;  // (b, col_tiles, x.padded), only for per-vector sums
  float* col_slots;  // (b, row_tiles * cluster, y.padded)
  int32_t side_x, side_y;
  int32_t within, cluster, parts, want;
};

// One item of one request, as the fold reads it.
struct Problem {
  const float* inverse_x;
  const float* inverse_y;
  float* row_slots;
  float* col_slots;
  int64_t padded_x, padded_y;
  int32_t map_x, map_y;
  int32_t item, items;     // third coordinate of the tensor maps; the low parts lie `items` further on
  int32_t steps, parts;    // k-steps of one part; 1 or 3 products
  int32_t within, request;
};

struct Best {
  float value;  // -1: no pair
  int32_t i, j;
};

ORTHOFAST_HOST_DEVICE inline bool ranks_before(const Best& a, const Best& b) {
  if (a.value != b.value) return a.value > b.value;
  return a.i < b.i || (a.i == b.i && a.j < b.j);
}

constexpr int kSlots = 16;  // partials of an entry: 8 warps of at most 2 CTAs

ORTHOFAST_HOST_DEVICE inline int64_t slot_of(int64_t entry, int rank, int warp) { return entry * kSlots + rank * 8 + warp; }

// Everything a launch reads, by value.
struct CallTables {
  const SideTable* sides;
  const RequestTable* requests;
  const unsigned char* maps;  // 128 bytes each
  Problem* problems;
  WorkEntry* entries;
  int32_t* redo;              // per problem: rounding was too coarse, fold again with split operands
  float* abs_sum;             // (entries, kSlots), each sum in an array of its own; small tiles use half of the slots
  float* sq_sum;
  float* sum;
  Best* best;
  int64_t side_count, request_count, problem_count, entry_count, group_count;
};

// Last table row whose `first` is not above `at`.
template <typename Row, typename Key>
ORTHOFAST_HOST_DEVICE inline int64_t row_holding(const Row* rows, int64_t count, int64_t at, Key first) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first(rows[middle]) <= at) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Vectors of one unit of the length kernel: a warp each, or 64 side by side where vectors are interleaved.
ORTHOFAST_HOST_DEVICE inline int64_t group_vectors(const SideTable& side) {
  return side.mn_major && side.wide ? 64 : 8;
}

// Rounding floor of one |cos| through fp16 operands: 0.8 * sqrt(2) * rms relative rounding error of 11 bits, per sqrt(d).
constexpr double kHalfFloor = 2.33e-4;
constexpr double kRoundingAllowed = 1e-4;  // relative error of the mean through rounded operands

ORTHOFAST_HOST_DEVICE inline bool near_floor(double abs_sum, double pairs, double d) {
  const double mean = abs_sum / pairs;
  return 0.5 * kHalfFloor * kHalfFloor / d > kRoundingAllowed * mean * mean;
}

// Lengths whose dot products float32 holds to full accuracy, squared: 2^-45 to 2^60.
constexpr double kLeastSquare = 0x1p-90, kMostSquare = 0x1p120;

// Power of two that brings the largest element into [2^14, 2^15): fp16 keeps 2^-39 of it; inverse stays a normal float.
ORTHOFAST_HOST_DEVICE inline int scale_exponent(int largest_exponent) {
  const int exponent = 15 - largest_exponent;  // largest in [2^(e-1), 2^e)
  return exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
}

}  // namespace cuda
}  // namespace orthofast
