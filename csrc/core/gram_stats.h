// The contract of the native fold: what is asked, and where the answers go.
//
// No Python and no torch: the caller owns every buffer, strides count elements, pointers may be unaligned
// to more than their element. Fields as in orthofast/records.py.
#pragma once

#include <cstdint>

namespace orthofast {

enum class Dtype : int32_t { f64 = 0, f32, f16, bf16, e4m3fn, e5m2, e4m3fnuz, e5m2fnuz };

// Arithmetic asked for; bfloat16 tiles serve float32 input only where the processor multiplies them natively.
enum class Precision : int32_t { highest = 0, high, float64 };

enum Want : int32_t { kAbsSum = 1, kSqSum = 2, kSum = 4, kAbsMax = 8, kRowAbs = 16, kHist = 32 };

// One side of the pairs: b items of n vectors of length d.
struct Vectors {
  const void* data;
  int64_t n;
  int64_t stride_b, stride_n, stride_d;
  double* norm_sq;  // (b, n) out
  double* row_abs;  // (b, n) out, null unless kRowAbs
};

// One fold. Without `cross` the pairs are those within x, and y is ignored.
struct GramArgs {
  Vectors x, y;
  bool cross, normalize;
  Dtype dtype;
  Precision precision;
  int32_t want, bins;
  int64_t b, d;
  double* sums;     // (b, 5) out: abs_sum, sq_sum, sum, abs_max, floor
  int64_t* counts;  // (b, 5) out: pairs, zero, nonfinite, argmax i, argmax j
  int64_t* hist;    // (b, bins) out, null unless kHist
};

constexpr int kSums = 5;
constexpr int kCounts = 5;

// Folds `count` requests with one team of threads; the bits do not depend on `threads`.
// Throws std::bad_alloc, nothing else.
void gram_stats_cpu(const GramArgs* requests, int64_t count, int threads);

}  // namespace orthofast
