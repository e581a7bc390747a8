// Lengths of all vectors in float64, and float32 or fp8 vectors as scaled fp16 operands, in one launch over all sides.
//
// One read of the data for exact operands, two where they are rounded. The sums run in fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "cuda/tables.h"

namespace orthofast {
namespace cuda {

constexpr int kPrepareThreads = 256;
constexpr float kLowScale = 2048.0f;  // the low part carries 2^11 times its value

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float as_float(__nv_fp8_e4m3 value) { return static_cast<float>(value); }
__device__ __forceinline__ float as_float(__nv_fp8_e5m2 value) { return static_cast<float>(value); }

// elements a thread loads at once: 16 bytes, 8 of one-byte elements, whose squares would fill the registers
template <typename T>
constexpr int kWide = sizeof(T) == 1 ? 8 : 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ void load_wide(const T* from, float (&to)[kWide<T>]) {
  using Bits = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
  union {
    Bits bits;
    T element[kWide<T>];
  } raw{*reinterpret_cast<const Bits*>(from)};
#pragma unroll
  for (int i = 0; i < kWide<T>; ++i) to[i] = as_float(raw.element[i]);
}

struct Length {
  double square = 0;
  float largest = 0;
};

__device__ __forceinline__ void add(Length& length, float value) {
  length.square = fma(static_cast<double>(value), static_cast<double>(value), length.square);
  length.largest = fmaxf(length.largest, fabsf(value));
}

// A vector's power-of-two scale, as two factors that cannot overflow.
struct Scale {
  float first, second;
  int exponent;
};

__device__ __forceinline__ Scale scale_of(const Length& length) {
  int exponent = 15;
  if (length.largest > 0 && isfinite(length.square)) frexpf(length.largest, &exponent);
  const int power = scale_exponent(exponent), half = power / 2;
  return Scale{ldexpf(1.0f, half), ldexpf(1.0f, power - half), power};
}

// One element as a high and a low part.
struct Parts {
  __half high, low;
};

// The square of what the parts say, the low one only if `split`, is added.
__device__ __forceinline__ Parts parts_of(float value, const Scale& scale, bool split, double& square) {
  const float scaled = value * scale.first * scale.second;
  const __half high = __float2half_rn(scaled);
  const __half low = __float2half_rn((scaled - __half2float(high)) * kLowScale);
  double kept = __half2float(high);
  if (split) kept += static_cast<double>(__half2float(low)) / kLowScale;
  square = fma(kept, kept, square);
  return Parts{high, low};
}

__device__ __forceinline__ float inverse_length(const SideTable& side, bool rounded, double square, int exponent) {
  if (!side.normalize) return rounded ? ldexpf(1.0f, -exponent) : 1.0f;
  if (square == 0) return 0.0f;
  // as stored, dot products of such lengths leave float32: no answer rather than a wrong one
  if (!rounded && (square < kLeastSquare || square > kMostSquare)) return __int_as_float(0x7fc00000);
  return static_cast<float>(1.0 / sqrt(square));
}

__device__ __forceinline__ double sum_over_warp(double value) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// A warp walks one vector; any strides.
template <typename T>
__device__ void prepare_vector(const SideTable& side, int64_t item, int64_t vector, bool rounded, bool split) {
  const int lane = threadIdx.x % 32;
  const T* from = static_cast<const T*>(side.data) + item * side.stride_b + vector * side.stride_n;
  const int64_t whole = side.wide ? side.d / kWide<T> : 0;
  Length length;
  for (int64_t i = lane; i < whole; i += 32) {
    float value[kWide<T>];
    load_wide(from + i * kWide<T>, value);
#pragma unroll
    for (int j = 0; j < kWide<T>; ++j) add(length, value[j]);
  }
  for (int64_t k = whole * kWide<T> + lane; k < side.d; k += 32) add(length, as_float(from[k * side.stride_d]));
  length.square = sum_over_warp(length.square);
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    length.largest = fmaxf(length.largest, __shfl_xor_sync(0xffffffffu, length.largest, step));
  }

  double square = length.square;
  int exponent = 0;
  if (rounded) {
    const Scale scale = scale_of(length);
    exponent = scale.exponent;
    square = 0;
    __half* high = static_cast<__half*>(side.operand) + (item * side.n + vector) * side.pitch;
    __half* low = high + side.b * side.n * side.pitch;
    for (int64_t i = lane; i < whole; i += 32) {
      float value[kWide<T>];
      load_wide(from + i * kWide<T>, value);
      // 8 bytes hold 4 halves, the least that a wide load brings
#pragma unroll
      for (int j = 0; j < kWide<T>; j += 4) {
        union {
          uint2 bits;
          __half element[4];
        } highs, lows;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Parts parts = parts_of(value[j + e], scale, split, square);
          highs.element[e] = parts.high;
          lows.element[e] = parts.low;
        }
        *reinterpret_cast<uint2*>(high + i * kWide<T> + j) = highs.bits;
        if (split) *reinterpret_cast<uint2*>(low + i * kWide<T> + j) = lows.bits;
      }
    }
    for (int64_t k = whole * kWide<T> + lane; k < side.d; k += 32) {
      const Parts parts = parts_of(as_float(from[k * side.stride_d]), scale, split, square);
      high[k] = parts.high;
      if (split) low[k] = parts.low;
    }
    square = sum_over_warp(square);
  }
  if (lane == 0) {
    side.norm_sq[item * side.n + vector] = length.square;
    side.inverse[item * side.padded + vector] = inverse_length(side, rounded, square, exponent);
  }
}

// Shared memory of a block that walks interleaved vectors: a row per warp.
struct Interleaved {
  double square[kPrepareThreads / 32][64];
  float largest[kPrepareThreads / 32][64];
  Scale scale[64];
};

// visit(k, first of the thread's columns, their values) for all k, over 64 vectors side by side.
template <typename T, typename Visit>
__device__ __forceinline__ void walk_interleaved(const SideTable& side, const T* from, int64_t vector, Visit visit) {
  constexpr int kAcross = 64 / kWide<T>, kDown = kPrepareThreads / kAcross;
  const int across = threadIdx.x % kAcross * kWide<T>, down = threadIdx.x / kAcross;
  const int64_t left = side.n - vector - across;
  for (int64_t k = down; k < side.d; k += kDown) {
    const T* row = from + k * side.stride_d + vector + across;
    float value[kWide<T>] = {};
    if (left >= kWide<T>) {
      load_wide(row, value);
    } else {
#pragma unroll
      for (int j = 0; j < kWide<T>; ++j) {
        if (j < left) value[j] = as_float(row[j]);
      }
    }
    visit(k, across, value);
  }
}

// Joins what the threads of a warp know of the same columns: lanes whose numbers agree modulo 64 / kWide.
template <typename T>
__device__ __forceinline__ void join_lanes(double& square, float& largest) {
#pragma unroll
  for (int step = 16; step >= 64 / kWide<T>; step >>= 1) {
    square += __shfl_xor_sync(0xffffffffu, square, step);
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
}

// A block walks 64 vectors whose elements lie side by side.
template <typename T>
__device__ void prepare_interleaved(const SideTable& side, Interleaved& shared, int64_t item, int64_t vector, bool rounded,
                                    bool split) {
  constexpr int kAcross = 64 / kWide<T>, kWarps = kPrepareThreads / 32;
  const int across = threadIdx.x % kAcross * kWide<T>, warp = threadIdx.x / 32;
  const bool writes = threadIdx.x % 32 < kAcross;
  const T* from = static_cast<const T*>(side.data) + item * side.stride_b;
  Length length[kWide<T>];
  walk_interleaved(side, from, vector, [&](int64_t, int, const float(&value)[kWide<T>]) {
#pragma unroll
    for (int j = 0; j < kWide<T>; ++j) add(length[j], value[j]);
  });
#pragma unroll
  for (int j = 0; j < kWide<T>; ++j) {
    join_lanes<T>(length[j].square, length[j].largest);
    if (writes) {
      shared.square[warp][across + j] = length[j].square;
      shared.largest[warp][across + j] = length[j].largest;
    }
  }
  __syncthreads();
  const int64_t mine = vector + threadIdx.x;
  double square = 0;
  if (threadIdx.x < 64) {
    Length whole;
    for (int w = 0; w < kWarps; ++w) {
      whole.square += shared.square[w][threadIdx.x];
      whole.largest = fmaxf(whole.largest, shared.largest[w][threadIdx.x]);
    }
    square = whole.square;
    shared.scale[threadIdx.x] = scale_of(whole);
    if (mine < side.n) side.norm_sq[item * side.n + mine] = square;
  }
  __syncthreads();
  if (rounded) {
    __half* high = static_cast<__half*>(side.operand) + item * side.d * side.pitch;
    __half* low = high + side.b * side.d * side.pitch;
    double kept[kWide<T>] = {};
    walk_interleaved(side, from, vector, [&](int64_t k, int at, const float(&value)[kWide<T>]) {
      const int64_t to = k * side.pitch + vector + at;
#pragma unroll
      for (int j = 0; j < kWide<T>; ++j) {
        const Parts parts = parts_of(value[j], shared.scale[at + j], split, kept[j]);
        if (vector + at + j < side.n) {
          high[to + j] = parts.high;
          if (split) low[to + j] = parts.low;
        }
      }
    });
#pragma unroll
    for (int j = 0; j < kWide<T>; ++j) {
      float unused = 0;
      join_lanes<T>(kept[j], unused);
      if (writes) shared.square[warp][across + j] = kept[j];
    }
    __syncthreads();
    if (threadIdx.x < 64) {
      square = 0;
      for (int w = 0; w < kWarps; ++w) square += shared.square[w][threadIdx.x];
    }
  }
  if (threadIdx.x < 64) {
    side.inverse[item * side.padded + mine] =
        mine < side.n ? inverse_length(side, rounded, square, shared.scale[threadIdx.x].exponent) : 0.0f;
  }
  __syncthreads();  // shared memory is free for the next group
}

template <typename T>
__device__ __forceinline__ void prepare_group(const SideTable& side, Interleaved& shared, int64_t group, bool again) {
  const int64_t vectors = group_vectors(side), groups = side.padded / vectors;
  const int64_t item = group / groups, vector = group % groups * vectors;
  const bool rounded = side.kind != Operand::exact, split = again || side.kind == Operand::split;
  if (vectors == 64) {
    prepare_interleaved<T>(side, shared, item, vector, rounded, split);
    return;
  }
  const int64_t mine = vector + threadIdx.x / 32;
  if (mine < side.n) {
    prepare_vector<T>(side, item, mine, rounded, split);
  } else if (threadIdx.x % 32 == 0) {
    side.inverse[item * side.padded + mine] = 0.0f;
  }
}

// `again`: only rounded sides of problems that asked for split operands.
__global__ void __launch_bounds__(kPrepareThreads, 3) prepare(const __grid_constant__ CallTables call, bool again) {
  __shared__ Interleaved shared;
  for (int64_t group = blockIdx.x; group < call.group_count; group += gridDim.x) {
    const int64_t index =
        row_holding(call.sides, call.side_count, group, [](const SideTable& row) { return row.first_group; });
    const SideTable& side = call.sides[index];
    const int64_t local = group - side.first_group;
    if (again) {
      const int64_t item = local / (side.padded / group_vectors(side));
      if (side.kind != Operand::rounded || call.redo[side.first_problem + item] == 0) continue;
    }
    switch (side.dtype) {
      case Dtype::f32: prepare_group<float>(side, shared, local, again); break;
      case Dtype::f16: prepare_group<__half>(side, shared, local, again); break;
      case Dtype::bf16: prepare_group<__nv_bfloat16>(side, shared, local, again); break;
      case Dtype::e4m3fn: prepare_group<__nv_fp8_e4m3>(side, shared, local, again); break;
      case Dtype::e5m2: prepare_group<__nv_fp8_e5m2>(side, shared, local, again); break;
      default: break;  // refused before the launch
    }
  }
}

}  // namespace cuda
}  // namespace orthofast
