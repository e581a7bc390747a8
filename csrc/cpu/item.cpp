// Lengths, scales, counts and tasks of one item.
#include "item.h"

#include <cmath>
#include <limits>

#include "../core/schedule.h"
#include "scalar_read.h"

namespace orthofast {
namespace {

// Squared lengths within these need no scaling: products and their rounding errors stay normal numbers.
constexpr double kSafeLow32 = 1e-18, kSafeHigh32 = 1e18;
constexpr double kSafeLow64 = 1e-280, kSafeHigh64 = 1e280;

constexpr int64_t kOneBlock = 128;    // up to here one task: splitting costs more than it brings
constexpr int64_t kSmallBlock = 192;  // finer tasks where few blocks fit
constexpr int64_t kLargeFrom = 1536;

double largest_element(const ItemView& view, Dtype dtype, int64_t row, int64_t d) {
  ItemView plain = view;
  plain.exponent = nullptr;
  double largest = 0;
  with_dtype(dtype, [&](auto tag) {
    for (int64_t k = 0; k < d; ++k) {
      const double value = std::fabs(read_scaled<decltype(tag)::value>(plain, row, k, d));
      if (!(value <= largest)) largest = value;  // NaN stays
      if (std::isnan(largest)) return;
    }
  });
  return largest;
}

double scaled_square_sum(const ItemView& view, Dtype dtype, int64_t row, int64_t d, bool rounded) {
  double sum = 0;
  with_dtype(dtype, [&](auto tag) {
    for (int64_t k = 0; k < d; ++k) {
      double value = read_scaled<decltype(tag)::value>(view, row, k, d);
      if (rounded) value = f32_of_bf16(bf16_of_f32(static_cast<float>(value)));
      sum += value * value;
    }
  });
  return sum;
}

void settle_scaled(Item& item, Side& side) {
  const GramArgs& request = *item.request;
  side.exponent.assign(static_cast<size_t>(side.view.n), 0);
  side.view.exponent = side.exponent.data();
  for (int64_t i = 0; i < side.view.n; ++i) {
    const double largest = largest_element(side.view, request.dtype, i, request.d);
    if (largest == 0 || !std::isfinite(largest)) continue;  // counted already
    const int exponent = std::ilogb(largest);
    side.exponent[static_cast<size_t>(i)] = exponent;
    const double square = scaled_square_sum(side.view, request.dtype, i, request.d, false);
    side.norm_sq[i] = std::ldexp(square, 2 * exponent);
    const double used = rounds(item) ? scaled_square_sum(side.view, request.dtype, i, request.d, true) : square;
    side.inv[i] = 1.0 / std::sqrt(used);
  }
}

void settle_side(Item& item, Side& side) {
  const GramArgs& request = *item.request;
  const bool wide = request.dtype == Dtype::f64;
  // float32 arithmetic on float64 input never happens; float64 arithmetic on narrower input cannot overflow
  const double low = item.kind == Kind::f64 ? kSafeLow64 : kSafeLow32;
  const double high = item.kind == Kind::f64 ? kSafeHigh64 : kSafeHigh32;
  bool scale = false;
  for (int64_t i = 0; i < side.view.n; ++i) {
    const double square = side.norm_sq[i];
    bool zero = square == 0, bad = !std::isfinite(square);
    if (wide && (zero || bad)) {  // the square may have left the range, not the vector
      const double largest = largest_element(side.view, request.dtype, i, request.d);
      zero = largest == 0;
      bad = !std::isfinite(largest);
      if (bad) side.norm_sq[i] = std::isnan(largest) ? largest : square;
    }
    side.zero += zero;
    side.nonfinite += bad;
    const double used = side.inv[i];
    side.inv[i] = zero || bad ? 0.0 : 1.0 / std::sqrt(used);
    if (!zero && !bad) {
      scale = scale || !(square >= low && square <= high);
      const double length = std::sqrt(square);
      if (length > side.longest) side.longest = length;
    }
  }
  if (!request.normalize) {
    for (int64_t i = 0; i < side.view.n; ++i) side.inv[i] = 1.0;
  } else if (scale) {
    settle_scaled(item, side);
  }
}

}  // namespace

bool rounds(const Item& item) { return item.kind == Kind::bf16 && item.request->dtype == Dtype::f32; }

double bf16_floor(int64_t d) {
  // 0.8 * sqrt(2) * rms relative rounding error of 8 significant bits (1.6e-3), per sqrt(d)
  return d > 0 ? 1.86e-3 / std::sqrt(static_cast<double>(d)) : 0.0;
}

void measure_lengths(const KernelTable& table, Item& item, Side& side, int64_t first, int64_t count) {
  const GramArgs& request = *item.request;
  double* rounded = rounds(item) && request.normalize ? side.inv + first : nullptr;
  table.square_sums(side.view, request.dtype, request.d, first, count, side.norm_sq + first, rounded);
  if (rounded == nullptr) {
    for (int64_t i = first; i < first + count; ++i) side.inv[i] = side.norm_sq[i];
  }
}

void settle(Item& item) {
  const GramArgs& request = *item.request;
  settle_side(item, item.x);
  if (request.cross) settle_side(item, item.y);
  const int64_t n = item.x.view.n, m = item.right().view.n;
  const int64_t left = request.normalize ? n - item.x.zero : n;
  const int64_t right = request.normalize ? m - item.right().zero : m;
  item.pairs = request.cross ? left * right : left * (left - 1) / 2;
  item.visited = request.cross ? n * m : n * (n - 1) / 2;
  const bool fold = request.want != 0 && item.x.nonfinite + item.y.nonfinite == 0 && item.pairs > 0;
  const int64_t longer = n > m ? n : m;
  item.block = longer <= kOneBlock || longer >= kLargeFrom ? kMaxBlock : kSmallBlock;
  item.row_blocks = block_count(n, item.block);
  item.col_blocks = block_count(m, item.block);
  item.tasks = !fold ? 0 : request.cross ? item.row_blocks * item.col_blocks : triangle_entries(item.row_blocks);
  // a sum over `longer` partners fits in 62 bits at this scale
  const double product = request.normalize ? 1.01 : item.x.longest * item.right().longest * 1.01;
  const double bound = product * static_cast<double>(longer + 1);
  item.row_overflow = !std::isfinite(bound) || (item.kind != Kind::f64 && product > std::numeric_limits<float>::max());
  item.row_scale = bound > 0 && !item.row_overflow ? 61 - std::ilogb(bound) : 0;
}

}  // namespace orthofast
