// Work-list entry <-> pair of blocks: the upper triangle of blocks within one set, or all blocks between two.
#pragma once

#include <cstdint>

#include "fold.h"

namespace orthofast {
namespace {

struct BlockPair {
  int64_t row, col;
};

ORTHOFAST_HOST_DEVICE inline int64_t block_count(int64_t vectors, int64_t block) {
  return (vectors + block - 1) / block;
}

// Entries for `rows` blocks within one set: off-diagonal pairs, then the diagonal.
ORTHOFAST_HOST_DEVICE inline int64_t triangle_entries(int64_t rows) { return rows * (rows + 1) / 2; }

// Off-diagonal pairs come first, column by column; the half-filled diagonal blocks come last,
// where they even out the finish of the team.
ORTHOFAST_HOST_DEVICE inline BlockPair triangle_pair(int64_t entry, int64_t rows) {
  const int64_t off = rows * (rows - 1) / 2;
  if (entry >= off) return BlockPair{entry - off, entry - off};
  // column c >= 1 holds entries c(c-1)/2 .. c(c+1)/2 - 1
  int64_t low = 1, high = rows - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (middle * (middle - 1) / 2 <= entry) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return BlockPair{entry - low * (low - 1) / 2, low};
}

ORTHOFAST_HOST_DEVICE inline BlockPair rectangle_pair(int64_t entry, int64_t rows) {
  return BlockPair{entry % rows, entry / rows};
}

}  // namespace
}  // namespace orthofast
