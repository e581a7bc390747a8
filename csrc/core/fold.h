// Fold of cosines into running sums: the partial result of a set of pairs, and how two of them merge.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ORTHOFAST_HOST_DEVICE __host__ __device__
#else
#define ORTHOFAST_HOST_DEVICE
#endif

namespace orthofast {

struct Partial {
  double abs_sum, sq_sum, sum;
  double abs_max;  // -1: no pair yet
  int64_t i, j;    // the pair that attains it
};

namespace {  // internal linkage: per-file instruction-set flags must not leak through merged inline code

ORTHOFAST_HOST_DEVICE inline Partial empty_partial() { return Partial{0.0, 0.0, 0.0, -1.0, -1, -1}; }

// Whether pair (i, j) with this value outranks the best so far: larger, or equal and earlier.
ORTHOFAST_HOST_DEVICE inline bool outranks(double value, int64_t i, int64_t j, const Partial& best) {
  if (value != best.abs_max) return value > best.abs_max;
  return i < best.i || (i == best.i && j < best.j);
}

ORTHOFAST_HOST_DEVICE inline void merge(Partial& into, const Partial& other) {
  into.abs_sum += other.abs_sum;
  into.sq_sum += other.sq_sum;
  into.sum += other.sum;
  if (other.abs_max >= 0 && outranks(other.abs_max, other.i, other.j, into)) {
    into.abs_max = other.abs_max;
    into.i = other.i;
    into.j = other.j;
  }
}

}  // namespace
}  // namespace orthofast
