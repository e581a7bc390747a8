// One stored element as a number, for every dtype; the slow path of packing and of the norms.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"

namespace orthofast {
namespace {

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To out;
  std::memcpy(&out, &value, sizeof(To));
  return out;
}

inline float f32_of_bf16(uint16_t bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }

// round to nearest even; the caller knows the value is finite
inline uint16_t bf16_of_f32(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f32_of_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // a subnormal or normal half is its bits, shifted, times 2^112
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f));
}

template <Dtype S>
struct Stored;
template <>
struct Stored<Dtype::f64> {
  using Type = double;
  static constexpr bool is8 = false;
  static double value(const Type* p, const float*) { return *p; }
};
template <>
struct Stored<Dtype::f32> {
  using Type = float;
  static constexpr bool is8 = false;
  static float value(const Type* p, const float*) { return *p; }
};
template <>
struct Stored<Dtype::f16> {
  using Type = uint16_t;
  static constexpr bool is8 = false;
  static float value(const Type* p, const float*) { return f32_of_f16(*p); }
};
template <>
struct Stored<Dtype::bf16> {
  using Type = uint16_t;
  static constexpr bool is8 = false;
  static float value(const Type* p, const float*) { return f32_of_bf16(*p); }
};
// every 8-bit dtype goes through its table of 256 values
template <>
struct Stored<Dtype::e4m3fn> {
  using Type = uint8_t;
  static constexpr bool is8 = true;
  static float value(const Type* p, const float* table) { return table[*p]; }
};

// 2^-exponent in two exact factors: one alone may leave the range of float64.
struct Scale {
  double first, second;
};
inline Scale scale_of(int32_t exponent) {
  const int32_t half = exponent / 2;
  return Scale{std::ldexp(1.0, -half), std::ldexp(1.0, half - exponent)};
}

// Element k of vector `row`, scaled; zero beyond the ends.
template <Dtype S>
inline double read_scaled(const ItemView& view, int64_t row, int64_t k, int64_t d) {
  if (row >= view.n || k >= d) return 0.0;
  using T = typename Stored<S>::Type;
  const T* p = static_cast<const T*>(view.data) + row * view.stride_n + k * view.stride_d;
  const double value = Stored<S>::value(p, view.table8);
  if (view.exponent == nullptr) return value;
  const Scale scale = scale_of(view.exponent[row]);
  return value * scale.first * scale.second;
}

template <Dtype S>
struct Tag {
  static constexpr Dtype value = S;
};

// Calls f with a Tag of the stored dtype; the four 8-bit dtypes share one.
template <class F>
inline void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f64: f(Tag<Dtype::f64>{}); break;
    case Dtype::f32: f(Tag<Dtype::f32>{}); break;
    case Dtype::f16: f(Tag<Dtype::f16>{}); break;
    case Dtype::bf16: f(Tag<Dtype::bf16>{}); break;
    default: f(Tag<Dtype::e4m3fn>{}); break;
  }
}

}  // namespace
}  // namespace orthofast
