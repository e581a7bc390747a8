// Which compiled fold serves a launch.
#pragma once

#include "cuda/fold.cuh"
#include "cuda/kernels.h"

namespace orthofast {
namespace cuda {
namespace {

constexpr int kMoments = kAbsSum | kSqSum | kSum | kAbsMax, kEverything = kMoments | kRowAbs;

template <typename Tile, bool kBf16, bool kMnMajor>
FoldKernel fold_of(int want) {
  return want == kAbsSum    ? fold<Tile, kBf16, kMnMajor, kAbsSum>
         : want == kMoments ? fold<Tile, kBf16, kMnMajor, kMoments>
                            : fold<Tile, kBf16, kMnMajor, kEverything>;
}

template <bool kBf16>
FoldKernel fold_in(bool large, bool mn_major, int want) {
  if (large) return mn_major ? fold_of<LargeTile, kBf16, true>(want) : fold_of<LargeTile, kBf16, false>(want);
  return mn_major ? fold_of<SmallTile, kBf16, true>(want) : fold_of<SmallTile, kBf16, false>(want);
}

}  // namespace
}  // namespace cuda
}  // namespace orthofast
