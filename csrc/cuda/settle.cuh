// Before and after the fold: tables to the device, the work list written out, partials joined in fixed order.
#pragma once

#include <cstdint>

#include "cuda/hopper.cuh"
#include "cuda/tables.h"

namespace orthofast {
namespace cuda {

constexpr int kSettleThreads = 256;

// A piece of the tables as a kernel's argument: no copy from host memory, so a captured graph holds its own.
template <int kWords>
struct Piece {
  uint4 words[kWords];
};

template <int kWords>
__global__ void __launch_bounds__(kSettleThreads) upload(const __grid_constant__ Piece<kWords> piece, uint4* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = piece.words[i];
  __threadfence();
  release_tensor_maps();
}

// Fills the problem table and the work list, clears the marks.
__global__ void __launch_bounds__(kSettleThreads) expand(const __grid_constant__ CallTables call) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t p = thread; p < call.problem_count; p += threads) {
    const int64_t index =
        row_holding(call.requests, call.request_count, p, [](const RequestTable& row) { return row.first_problem; });
    const RequestTable& request = call.requests[index];
    const SideTable &x = call.sides[request.side_x], &y = call.sides[request.side_y];
    const int64_t item = p - request.first_problem;
    const bool slots = request.row_slots != nullptr;
    call.problems[p] = Problem{
        x.inverse + item * x.padded,
        y.inverse + item * y.padded,
        slots ? request.row_slots + item * request.col_tiles * x.padded : nullptr,
        slots ? request.col_slots + item * request.row_tiles * request.cluster * y.padded : nullptr,
        x.padded,
        y.padded,
        x.map,
        y.map,
        static_cast<int32_t>(item),
        static_cast<int32_t>(request.b),
        static_cast<int32_t>(block_count(request.d, 64)),
        request.parts,
        request.within,
        static_cast<int32_t>(index)};
    call.redo[p] = 0;
  }
  for (int64_t e = thread; e < call.entry_count; e += threads) {
    const RequestTable& request = call.requests[row_holding(
        call.requests, call.request_count, e, [](const RequestTable& row) { return row.first_entry; })];
    const int64_t local = e - request.first_entry, item = local / request.entries;
    call.entries[e] = pack_entry(request.first_problem + item, band_pair(local % request.entries, request.row_tiles,
                                                                         request.col_tiles, request.within != 0));
  }
}

struct Total {
  double abs_sum, sq_sum, sum;
  Best best;
  int64_t zero_x, zero_y, nonfinite;
};

__device__ __forceinline__ void count_special(const SideTable& side, int64_t item, int64_t& zero, int64_t& nonfinite) {
  const double* norm_sq = side.norm_sq + item * side.n;
  for (int64_t i = threadIdx.x; i < side.n; i += kSettleThreads) {
    zero += norm_sq[i] == 0;
    nonfinite += !isfinite(norm_sq[i]);
  }
}

// One block per problem: float32 partials in entry order, strided over the threads, then a tree; all float64.
__global__ void __launch_bounds__(kSettleThreads) finish(const __grid_constant__ CallTables call, bool again) {
  __shared__ Total totals[kSettleThreads];
  const int64_t p = blockIdx.x;
  if (again && call.redo[p] == 0) return;
  const Problem& problem = call.problems[p];
  const RequestTable& request = call.requests[problem.request];
  const SideTable &x = call.sides[request.side_x], &y = call.sides[request.side_y];
  const int64_t item = problem.item, per_entry = request.cluster * 8, count = request.entries * per_entry;
  const int64_t first = request.first_entry + item * request.entries;
  const bool moments = (request.want & (kSqSum | kSum)) != 0, maximum = (request.want & kAbsMax) != 0;

  Total mine{0, 0, 0, Best{-1.0f, -1, -1}, 0, 0, 0};
  for (int64_t i = threadIdx.x; i < count; i += kSettleThreads) {
    const int64_t slot = slot_of(first + i / per_entry, 0, static_cast<int>(i % per_entry));
    mine.abs_sum += call.abs_sum[slot];
    if (moments) {
      mine.sq_sum += call.sq_sum[slot];
      mine.sum += call.sum[slot];
    }
    if (maximum && ranks_before(call.best[slot], mine.best)) mine.best = call.best[slot];
  }
  count_special(x, item, mine.zero_x, mine.nonfinite);
  if (!request.within) count_special(y, item, mine.zero_y, mine.nonfinite);
  totals[threadIdx.x] = mine;
  for (int step = kSettleThreads / 2; step > 0; step >>= 1) {
    __syncthreads();
    if (threadIdx.x < step) {
      Total& into = totals[threadIdx.x];
      const Total& other = totals[threadIdx.x + step];
      into.abs_sum += other.abs_sum;
      into.sq_sum += other.sq_sum;
      into.sum += other.sum;
      if (ranks_before(other.best, into.best)) into.best = other.best;
      into.zero_x += other.zero_x;
      into.zero_y += other.zero_y;
      into.nonfinite += other.nonfinite;
    }
  }
  if (threadIdx.x != 0) return;

  const Total& total = totals[0];
  const bool normalize = x.normalize != 0;
  const int64_t n = x.n - (normalize ? total.zero_x : 0), m = y.n - (normalize ? total.zero_y : 0);
  const int64_t pairs = request.within ? n * (n - 1) / 2 : n * m;
  const bool bad = total.nonfinite > 0, none = bad || total.best.value < 0, rounded = x.kind == Operand::rounded;
  const double nan = __longlong_as_double(0x7ff8000000000000ll);
  double* sums = request.sums + item * kSums;
  int64_t* counts = request.counts + item * kCounts;
  sums[0] = bad ? nan : total.abs_sum;
  sums[1] = bad ? nan : total.sq_sum;
  sums[2] = bad ? nan : total.sum;
  sums[3] = none ? nan : total.best.value;
  sums[4] = rounded && !again ? kHalfFloor / sqrt(static_cast<double>(request.d)) : 0.0;
  counts[0] = pairs;
  counts[1] = total.zero_x + total.zero_y;
  counts[2] = total.nonfinite;
  counts[3] = none ? -1 : total.best.i;
  counts[4] = none ? -1 : total.best.j;
  if (!again && rounded && normalize && !bad && pairs > 0) {
    call.redo[p] = near_floor(total.abs_sum, static_cast<double>(pairs), static_cast<double>(request.d));
  }
}

// Per vector: the slots of its tiles in order. blockIdx.y is the side; every problem has slots.
__global__ void __launch_bounds__(kSettleThreads) finish_vectors(const __grid_constant__ CallTables call) {
  const SideTable& side = call.sides[blockIdx.y];
  if (side.row_abs == nullptr) return;
  const int64_t total = side.b * side.n;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < total;
       at += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t item = at / side.n, i = at % side.n;
    const Problem& problem = call.problems[side.first_problem + item];
    const RequestTable& request = call.requests[problem.request];
    const bool is_x = request.side_x == static_cast<int32_t>(blockIdx.y);
    const int64_t tile = i / (128 * request.cluster);
    double sum = 0;
    if (is_x && tile < request.row_tiles) {
      for (int64_t c = request.within ? tile : 0; c < request.col_tiles; ++c) sum += problem.row_slots[c * side.padded + i];
    }
    if (request.within || !is_x) {
      const int64_t above = request.within && tile < request.row_tiles ? tile + 1 : request.row_tiles;
      for (int64_t r = 0; r < above * request.cluster; ++r) sum += problem.col_slots[r * side.padded + i];
    }
    const bool bad = request.counts[item * kCounts + 2] > 0;
    side.row_abs[at] = bad ? __longlong_as_double(0x7ff8000000000000ll) : sum;
  }
}

}  // namespace cuda
}  // namespace orthofast
