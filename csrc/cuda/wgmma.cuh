// One wgmma: 64 x N x 16 products of 16-bit operands in shared memory, added to float32 registers.
#pragma once

#include <cstdint>

namespace orthofast {
namespace cuda {

#define ORTHOFAST_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ORTHOFAST_16(d, i) ORTHOFAST_4(d, i), ORTHOFAST_4(d, i + 4), ORTHOFAST_4(d, i + 8), ORTHOFAST_4(d, i + 12)

// operands: registers, descriptor of A, of B, whether to add to what is there, transposition of both
#define ORTHOFAST_WGMMA_256(TYPE) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " " \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      "%128, %129, p, 1, 1, %131, %131;\n}\n" \
      : ORTHOFAST_16(d, 0), ORTHOFAST_16(d, 16), ORTHOFAST_16(d, 32), ORTHOFAST_16(d, 48), \
        ORTHOFAST_16(d, 64), ORTHOFAST_16(d, 80), ORTHOFAST_16(d, 96), ORTHOFAST_16(d, 112) \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kMnMajor ? 1 : 0))

#define ORTHOFAST_WGMMA_128(TYPE) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " " \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, p, 1, 1, %67, %67;\n}\n" \
      : ORTHOFAST_16(d, 0), ORTHOFAST_16(d, 16), ORTHOFAST_16(d, 32), ORTHOFAST_16(d, 48) \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kMnMajor ? 1 : 0))

// d (64 x 2 * kAccumulators) = [d +] a b^T; kMnMajor: both operands hold vectors contiguously.
template <bool kBf16, bool kMnMajor, int kAccumulators>
__device__ __forceinline__ void multiply(float (&d)[kAccumulators], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kAccumulators == 128 || kAccumulators == 64, "64 x 256 or 64 x 128");
  if constexpr (kAccumulators == 128 && kBf16) {
    ORTHOFAST_WGMMA_256("bf16");
  } else if constexpr (kAccumulators == 128) {
    ORTHOFAST_WGMMA_256("f16");
  } else if constexpr (kBf16) {
    ORTHOFAST_WGMMA_128("bf16");
  } else {
    ORTHOFAST_WGMMA_128("f16");
  }
}

#undef ORTHOFAST_WGMMA_256
#undef ORTHOFAST_WGMMA_128
#undef ORTHOFAST_16
#undef ORTHOFAST_4

}  // namespace cuda
}  // namespace orthofast
