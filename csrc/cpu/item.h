// One item of a request: its vectors' lengths and scales, what is counted, and how its pairs are cut into tasks.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernel_table.h"

namespace orthofast {

// One side of one item, after its lengths are known.
struct Side {
  ItemView view{};
  double* norm_sq = nullptr;         // (n,) out
  double* inv = nullptr;             // (n,) working copy behind view.inv
  std::vector<int32_t> exponent;     // filled only where squares would leave the float range
  int64_t zero = 0, nonfinite = 0;
  double longest = 0;                // largest length
};

enum class Kind { f32, f64, bf16 };

struct Item {
  const GramArgs* request = nullptr;
  int64_t index = 0;  // within the request
  Side x, y;          // y only for cross folds
  Kind kind = Kind::f32;
  int64_t block = 0, row_blocks = 0, col_blocks = 0, tasks = 0;
  int64_t pairs = 0, visited = 0;  // visited counts the pairs with zero vectors too
  int64_t first_partial = 0;
  int row_scale = 0;               // sums per vector are integers times 2^-row_scale
  bool row_overflow = false;       // raw products may leave the range: sums per vector are NaN
  std::atomic<int64_t>* row_sum_x = nullptr;
  std::atomic<int64_t>* row_sum_y = nullptr;

  Item() = default;
  Item(const Item&) = delete;
  Item& operator=(const Item&) = delete;

  const Side& right() const { return request->cross ? y : x; }
};

// Squared lengths of vectors first .. first+count-1, into norm_sq and (rounded for bfloat16 tiles, or not) inv.
void measure_lengths(const KernelTable& table, Item& item, Side& side, int64_t first, int64_t count);

// From squared lengths to factors, scales and counts; then the number of pairs and of tasks.
void settle(Item& item);

// Whether the item's operands are rounded on the way into the tiles.
bool rounds(const Item& item);

// The rounding floor of one |cos| through bfloat16 tiles, for vectors of length d.
double bf16_floor(int64_t d);

}  // namespace orthofast
