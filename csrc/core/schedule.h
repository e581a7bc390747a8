// Work-list entry <-> pair of blocks: the upper triangle of blocks within one set, or all blocks between two.
#pragma once

#include <cstdint>

#include "fold.h"

namespace orthofast {

// One entry of the device's work list: row tile | column tile << 16 of a problem.
struct WorkEntry {
  int32_t problem, tiles;
};

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

// --- the device's work list --------------------------------------------------------------------------------------

constexpr int64_t kBandTiles = 8;       // tile columns of a band: what a wave of tiles reads stays in the cache
constexpr int64_t kTileLimit = 32768;   // 16 + 16 bits of a signed word

ORTHOFAST_HOST_DEVICE inline WorkEntry pack_entry(int64_t problem, BlockPair pair) {
  return WorkEntry{static_cast<int32_t>(problem), static_cast<int32_t>(pair.row | pair.col << 16)};
}

ORTHOFAST_HOST_DEVICE inline BlockPair unpack_tiles(int32_t tiles) { return BlockPair{tiles & 0xffff, tiles >> 16}; }

// Rows of tiles that have a pair i < j, or any pair between two sets: the last vector of one set heads none.
ORTHOFAST_HOST_DEVICE inline int64_t row_tiles(int64_t vectors, int64_t block, bool within) {
  return block_count(within ? vectors - 1 : vectors, block);
}

// Within one set the tiles are square, column >= row, and the last row may be missing.
ORTHOFAST_HOST_DEVICE inline int64_t band_entries(int64_t rows, int64_t cols, bool within) {
  return within ? triangle_entries(cols) - (cols - rows) : rows * cols;
}

// Entry of one problem in launch order: bands of tile columns, rows outer, the band's columns inner.
ORTHOFAST_HOST_DEVICE inline BlockPair band_pair(int64_t entry, int64_t rows, int64_t cols, bool within) {
  int64_t band = 0;
  if (within) {
    // q full bands hold the triangle of 8q columns
    int64_t low = 0, high = (cols - 1) / kBandTiles;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (triangle_entries(kBandTiles * middle) <= entry) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    band = low;
    entry -= triangle_entries(kBandTiles * band);
  } else {
    band = entry / (rows * kBandTiles);
    entry -= band * rows * kBandTiles;
  }
  const int64_t first = band * kBandTiles;
  int64_t width = cols - first < kBandTiles ? cols - first : kBandTiles;
  if (!within || entry < first * width) return BlockPair{entry / width, first + entry % width};
  entry -= first * width;
  int64_t row = first;
  while (entry >= width) {  // at most 7 rows of the band's own triangle
    entry -= width--;
    ++row;
  }
  return BlockPair{row, row + entry};
}

}  // namespace
}  // namespace orthofast
