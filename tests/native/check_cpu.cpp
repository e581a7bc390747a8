// Folds of many shapes, dtypes and strides against double loops, on every instruction set of the processor.
//
// A plain program, so that sanitizers watch the native code without Python in the way.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/gram_stats.h"
#include "core/schedule.h"
#include "cpu/isa.h"

using namespace orthofast;

namespace {

int failures = 0;

void fail(const std::string& what) {
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

struct Case {
  int64_t b, n, m, d;  // m < 0: pairs within one set
  Dtype dtype;
  bool columns, normalize;
  Precision precision;
};

std::string describe(const Case& c, const char* isa, int threads) {
  return std::string(isa) + " b" + std::to_string(c.b) + " n" + std::to_string(c.n) + " m" + std::to_string(c.m) + " d" +
         std::to_string(c.d) + " dtype" + std::to_string(static_cast<int>(c.dtype)) + (c.columns ? " columns" : " rows") +
         (c.normalize ? "" : " raw") + " precision" + std::to_string(static_cast<int>(c.precision)) + " threads" +
         std::to_string(threads);
}

// exactly sized heap memory: an out-of-bounds read or write is seen
struct Stored {
  std::vector<unsigned char> bytes;
  std::vector<double> values;  // (b, n, d)
};

Stored draw(std::mt19937_64& random, int64_t b, int64_t n, int64_t d, const Case& c) {
  std::normal_distribution<double> normal;
  Stored stored;
  const size_t count = static_cast<size_t>(b * n * d);
  const size_t size = c.dtype == Dtype::f64 ? 8 : c.dtype == Dtype::f32 ? 4 : 2;
  stored.bytes.resize(count * size);
  stored.values.resize(count);
  for (size_t i = 0; i < count; ++i) {
    double value = normal(random);
    unsigned char* to = stored.bytes.data() + i * size;
    if (c.dtype == Dtype::f64) {
      std::memcpy(to, &value, 8);
    } else {
      float narrow = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &narrow, 4);
      if (c.dtype == Dtype::bf16) bits &= 0xffff0000u;
      std::memcpy(&narrow, &bits, 4);
      value = narrow;
      if (c.dtype == Dtype::f32) std::memcpy(to, &narrow, 4);
      const uint16_t high = static_cast<uint16_t>(bits >> 16);
      if (c.dtype == Dtype::bf16) std::memcpy(to, &high, 2);
    }
    const size_t per = static_cast<size_t>(n * d), item = per ? i / per : 0, rest = per ? i % per : 0;
    const size_t row = c.columns ? rest % static_cast<size_t>(n) : rest / static_cast<size_t>(d);
    const size_t k = c.columns ? rest / static_cast<size_t>(n) : rest % static_cast<size_t>(d);
    stored.values[item * per + row * static_cast<size_t>(d) + k] = value;
  }
  return stored;
}

struct Answer {
  std::vector<double> sums, norm_x, norm_y, row_x, row_y;
  std::vector<int64_t> counts, hist;
};

Vectors side(const Stored& s, int64_t n, int64_t d, bool columns, std::vector<double>& norm, std::vector<double>& row) {
  return Vectors{s.bytes.data(), n, n * d, columns ? 1 : d, columns ? n : 1, norm.data(), row.data()};
}

Answer fold(const Case& c, const Stored& x, const Stored& y, int threads, int32_t want, int32_t bins) {
  Answer a;
  const int64_t m = c.m < 0 ? 0 : c.m;
  a.sums.assign(static_cast<size_t>(c.b * kSums), NAN);
  a.counts.assign(static_cast<size_t>(c.b * kCounts), -77);
  a.hist.assign(static_cast<size_t>(c.b * bins), -77);
  a.norm_x.assign(static_cast<size_t>(c.b * c.n), NAN);
  a.row_x = a.norm_x;
  a.norm_y.assign(static_cast<size_t>(c.b * m), NAN);
  a.row_y = a.norm_y;
  GramArgs args{};
  args.x = side(x, c.n, c.d, c.columns, a.norm_x, a.row_x);
  if (c.m >= 0) args.y = side(y, m, c.d, c.columns, a.norm_y, a.row_y);
  args.cross = c.m >= 0;
  args.normalize = c.normalize;
  args.dtype = c.dtype;
  args.precision = c.precision;
  args.want = c.normalize ? want : want & ~kHist;
  args.bins = c.normalize ? bins : 0;
  args.b = c.b;
  args.d = c.d;
  args.sums = a.sums.data();
  args.counts = a.counts.data();
  args.hist = a.hist.data();
  gram_stats_cpu(&args, 1, threads);
  return a;
}

void compare(const Case& c, const Stored& x, const Stored& y, const Answer& a, const std::string& name) {
  const double tolerance = c.dtype == Dtype::f64 || c.precision == Precision::float64 ? 1e-12 : c.precision == Precision::high ? 3e-3 : 2e-5;
  for (int64_t item = 0; item < c.b; ++item) {
    double abs_sum = 0, sq_sum = 0, largest = -1, scale = 0;
    int64_t pairs = 0;
    std::vector<double> row(static_cast<size_t>(c.n), 0.0);
    const int64_t columns = c.m < 0 ? c.n : c.m;
    for (int64_t i = 0; i < c.n; ++i) {
      for (int64_t j = c.m < 0 ? i + 1 : 0; j < columns; ++j) {
        const double* p = x.values.data() + (item * c.n + i) * c.d;
        const double* q = (c.m < 0 ? x.values.data() + (item * c.n + j) * c.d : y.values.data() + (item * c.m + j) * c.d);
        double dot = 0, pp = 0, qq = 0;
        for (int64_t k = 0; k < c.d; ++k) dot += p[k] * q[k], pp += p[k] * p[k], qq += q[k] * q[k];
        if (c.normalize && (pp == 0 || qq == 0)) continue;
        const double value = std::fabs(c.normalize ? dot / std::sqrt(pp * qq) : dot);
        scale += c.normalize ? 1 : std::sqrt(pp * qq);
        ++pairs;
        abs_sum += value;
        sq_sum += value * value;
        row[static_cast<size_t>(i)] += value;
        if (c.m < 0) row[static_cast<size_t>(j)] += value;
        if (value > largest) largest = value;
      }
    }
    const double* sums = a.sums.data() + item * kSums;
    const int64_t* counts = a.counts.data() + item * kCounts;
    if (counts[0] != pairs) fail(name + " pairs");
    if (pairs == 0) continue;
    if (!(std::fabs(sums[0] - abs_sum) <= tolerance * scale)) fail(name + " abs_sum");
    if (!(std::fabs(sums[1] - sq_sum) <= tolerance * (1 + scale * scale))) fail(name + " sq_sum");
    if (!(std::fabs(sums[3] - largest) <= tolerance * (1 + scale))) fail(name + " abs_max");
    if (counts[3] < 0 || counts[4] >= columns || (c.m < 0 && counts[3] >= counts[4])) fail(name + " argmax");
    for (int64_t i = 0; i < c.n; ++i) {
      if (!(std::fabs(a.row_x[static_cast<size_t>(item * c.n + i)] - row[static_cast<size_t>(i)]) <= tolerance * (1 + scale))) {
        fail(name + " row_abs");
        break;
      }
    }
    if (c.normalize) {
      int64_t counted = 0;
      for (int64_t bin = 0; bin < 8; ++bin) counted += a.hist[static_cast<size_t>(item * 8 + bin)];
      if (counted != pairs) fail(name + " hist");
    }
  }
}

// memcmp, but an empty vector may have no address
bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

void check_case(const Case& c, const char* isa, std::mt19937_64& random) {
  const Stored x = draw(random, c.b, c.n, c.d, c), y = draw(random, c.b, c.m < 0 ? 0 : c.m, c.d, c);
  const int32_t all = kAbsSum | kSqSum | kSum | kAbsMax | kRowAbs | kHist;
  const Answer one = fold(c, x, y, 1, all, 8);
  compare(c, x, y, one, describe(c, isa, 1));
  for (int threads : {2, 3}) {
    const Answer more = fold(c, x, y, threads, all, 8);
    const bool same = same_bits(one.sums, more.sums) && same_bits(one.row_x, more.row_x) && same_bits(one.row_y, more.row_y) &&
                      one.counts == more.counts && one.hist == more.hist;
    if (!same) fail(describe(c, isa, threads) + ": not the same bits");
  }
  const Answer lean = fold(c, x, y, 2, kAbsSum, 0);
  for (int64_t item = 0; item < c.b; ++item) {
    const double p = lean.sums[static_cast<size_t>(item * kSums)], q = one.sums[static_cast<size_t>(item * kSums)];
    if (!(std::fabs(p - q) <= 1e-5 * (std::fabs(q) + 1e-3 * static_cast<double>(c.d)))) fail(describe(c, isa, 2) + ": abs_sum alone differs");
  }
}

void check_schedule() {
  for (int64_t rows = 1; rows <= 60; ++rows) {
    std::vector<int> seen(static_cast<size_t>(rows * rows), 0);
    for (int64_t entry = 0; entry < triangle_entries(rows); ++entry) {
      const BlockPair at = triangle_pair(entry, rows);
      if (at.row < 0 || at.row > at.col || at.col >= rows) fail("schedule out of the triangle");
      else ++seen[static_cast<size_t>(at.row * rows + at.col)];
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = i; j < rows; ++j)
        if (seen[static_cast<size_t>(i * rows + j)] != 1) fail("schedule misses or repeats a block pair");
  }
}

}  // namespace

int main() {
  check_schedule();
  std::mt19937_64 random(20240607);
  const int64_t shapes[][2] = {{0, 5}, {1, 5}, {2, 0}, {2, 1}, {3, 17}, {8, 256}, {47, 31}, {48, 257}, {49, 16}, {130, 33}, {200, 520}, {390, 20}};
  int count = 0;
  for (const KernelTable* table : isa_levels()) {
    force_isa(table->name);
    for (const auto& shape : shapes) {
      for (Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::bf16}) {
        for (bool columns : {false, true}) {
          const int64_t n = shape[0], d = shape[1];
          check_case({1, n, -1, d, dtype, columns, true, Precision::highest}, table->name, random);
          check_case({2, n, n / 2 + 1, d, dtype, columns, true, Precision::highest}, table->name, random);
          count += 2;
          if (n > 60) continue;
          check_case({3, n, -1, d, dtype, columns, false, Precision::highest}, table->name, random);
          check_case({1, n, -1, d, dtype, columns, true, Precision::float64}, table->name, random);
          check_case({1, n, -1, d, dtype, columns, true, Precision::high}, table->name, random);
          count += 3;
        }
      }
    }
  }
  std::printf("%d cases, %d failures\n", count, failures);
  return failures != 0;
}
