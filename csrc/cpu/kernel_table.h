// What an instruction-set file offers the driver: a table of functions, and the task they work on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/fold.h"
#include "../core/gram_stats.h"
#include "../core/pair_gradient.h"

namespace orthofast {

constexpr int64_t kMaxBlock = 384;  // vectors on a side of a block; a multiple of every panel width
constexpr int64_t kMaxGradientBlock = 288;  // the same for gradients, where derivatives and operands share L2
constexpr int64_t kDepthBytes = 1024;  // of one vector packed at a time: a panel and its partner stay in L2

// One item of one side, as the kernels read it.
struct ItemView {
  const void* data;
  int64_t n, stride_n, stride_d;
  const double* inv;        // (n,) factor of each vector: 1/length, 0 for zero vectors, 1 unless normalising
  const int32_t* exponent;  // (n,) vectors are read times 2^-exponent; null: as they are
  const float* table8;      // (256,) values of an 8-bit dtype
};

// One pair of blocks of one item.
struct BlockTask {
  const ItemView* left;
  const ItemView* right;
  int64_t row0, rows, col0, cols;
  bool diagonal;  // left and right are the same block: only pairs i < j
  Dtype dtype;
  int64_t d;
  int32_t want, bins;
  double* left_abs;   // (rows,) out: sums of |.| per vector, null unless kRowAbs
  double* right_abs;  // (cols,) out
  int64_t* hist;      // (bins,) out: counts of this task alone, null unless kHist
  uint64_t right_key;  // names the right block within the process; a thread packs it once for tasks in a row
  char* strip;         // strip_bytes for the packed right block over the whole of d, aligned to 64
  size_t strip_bytes;
};

// One pair of blocks of one item of unit vectors, (n, d) contiguous.
struct GradientTask {
  const void* left;
  const void* right;
  void* left_gradient;  // added to; null: the sum alone
  void* right_gradient;
  int64_t n_left, n_right, row0, rows, col0, cols, d;
  bool diagonal;  // left and right are the same block: its cosines are made whole, without i = j
  CurveKind curve;
  double width;
};

struct GradientTable {
  // the sum of the curve over the task's pairs; gradients are added to
  double (*block_f32)(const GradientTask&, char* workspace);
  double (*block_f64)(const GradientTask&, char* workspace);
  void (*radial_f32)(const void* units, void* gradient, const double* inverse, int64_t vectors, int64_t d);
  void (*radial_f64)(const void* units, void* gradient, const double* inverse, int64_t vectors, int64_t d);
  size_t workspace_bytes;
};

using FoldBlock = void (*)(const BlockTask&, char* workspace, Partial& out);

struct KernelTable {
  const char* name;
  // sums of squares of `count` vectors from `first`, in float64; `rounded` (may be null) after rounding to bfloat16
  void (*square_sums)(const ItemView&, Dtype, int64_t d, int64_t first, int64_t count, double* exact, double* rounded);
  FoldBlock fold_f32, fold_f64;
  FoldBlock fold_bf16;  // null: no native bfloat16 products
  // register-only multiply-add loop of that many steps, for measuring the ceiling; returns its flop
  double (*spin_f32)(int64_t steps);
  double (*spin_bf16)(int64_t steps);
  size_t workspace_bytes;
  GradientTable gradient;
};

// Null where the file was not compiled for this processor family.
const KernelTable* kernels_portable();
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512();
const KernelTable* kernels_avx512bf16();

}  // namespace orthofast
