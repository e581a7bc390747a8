// The contract of the native gradient: sums of a curve over pairs of unit vectors, and their gradients.
//
// No Python and no torch: the caller owns every buffer and has made the unit vectors. Curves as in
// orthofast/kernels/gradients.py.
#pragma once

#include <cstdint>

namespace orthofast {

enum class CurveKind : int32_t { abs = 0, huber, sqrt, square };

// One side of the pairs: b items of n unit vectors of length d, contiguous, as is what is written.
struct Units {
  const void* units;      // (b, n, d) float32 or float64; zero vectors are zero
  void* gradient;         // (b, n, d) of the same type, out; null: the sum alone
  const double* inverse;  // (b, n) 1 / length of the vectors the gradient is by
  int64_t n;
};

// Without `cross` the pairs are those within x, and y is ignored.
struct GradientArgs {
  Units x, y;
  bool cross, wide;  // wide: float64
  CurveKind curve;
  double width;
  int64_t b, d;
  double* totals;  // (b,) out
};

// Sums and gradients of all items with one team of threads; the bits do not depend on `threads`.
// Throws std::bad_alloc, nothing else.
void pair_gradient_cpu(const GradientArgs& args, int threads);

}  // namespace orthofast
