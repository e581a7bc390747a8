// The CPU driver: measure lengths, settle scales, fold all blocks of all items with one team, join in fixed order.
//
// Extra memory  12 bytes a vector, one partial sum a block pair, one workspace (about 2 MiB) a thread.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "../core/schedule.h"
#include "isa.h"
#include "item.h"
#include "team.h"

namespace orthofast {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kFlopWorthAThread = 2e6;   // below, waking a second thread costs more than it saves
constexpr int64_t kVectorsAtOnce = 128;     // vectors a thread measures at a time
constexpr double kRoundingAllowed = 1e-4;   // relative error of the mean through rounded tiles
constexpr size_t kLine = 64;                // bytes of a cache line
constexpr size_t kStripsBytes = size_t{24} << 20;  // packed strips of all threads together

constexpr size_t whole_lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Where the parts of a thread's scratch memory begin.
struct Layout {
  size_t hist, strip, strip_bytes, total;
};

// The floats of all sides, the partials of all tasks: allocated once a call.
struct Plan {
  std::unique_ptr<Item[]> items;
  int64_t count = 0;
  std::vector<double> inv;
  std::vector<std::atomic<int64_t>> row_sums;
  double flop = 0;
};

Kind choose_kind(const GramArgs& request, const KernelTable& table) {
  if (request.dtype == Dtype::f64 || request.precision == Precision::float64) return Kind::f64;
  const bool narrow = request.dtype != Dtype::f32 && request.dtype != Dtype::f16;  // exact in bfloat16
  const bool rounded = request.dtype == Dtype::f32 && request.precision == Precision::high && request.normalize;
  return table.fold_bf16 != nullptr && (narrow || rounded) ? Kind::bf16 : Kind::f32;
}

const float* table_of(Dtype dtype) {
  struct Tables {
    float value[4][256];
    Tables() {
      for (int t = 0; t < 4; ++t) {
        const bool e4 = t % 2 == 0, fnuz = t >= 2;
        const int mantissa_bits = e4 ? 3 : 2, bias = (e4 ? 7 : 15) + (fnuz ? 1 : 0);
        for (int bits = 0; bits < 256; ++bits) {
          const int exponent = (bits & 0x7f) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
          float v = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits)
                                  : std::ldexp(static_cast<float>(mantissa + (1 << mantissa_bits)), exponent - bias - mantissa_bits);
          if (fnuz) {
            if (bits == 0x80) v = std::numeric_limits<float>::quiet_NaN();
          } else if (e4 ? (bits & 0x7f) == 0x7f : exponent == 31 && mantissa != 0) {
            v = std::numeric_limits<float>::quiet_NaN();
          } else if (!e4 && exponent == 31) {
            v = std::numeric_limits<float>::infinity();
          }
          value[t][bits] = bits & 0x80 ? -v : v;
        }
      }
    }
  };
  static const Tables tables;
  return dtype < Dtype::e4m3fn ? nullptr : tables.value[static_cast<int>(dtype) - static_cast<int>(Dtype::e4m3fn)];
}

int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : dtype == Dtype::f16 || dtype == Dtype::bf16 ? 2 : 1;
}

void place_side(Side& side, const Vectors& vectors, const GramArgs& request, int64_t index, double* inv) {
  const int64_t bytes = element_bytes(request.dtype);
  side.view = ItemView{static_cast<const char*>(vectors.data) + index * vectors.stride_b * bytes, vectors.n,
                       vectors.stride_n, vectors.stride_d, inv, nullptr, table_of(request.dtype)};
  side.norm_sq = vectors.norm_sq + index * vectors.n;
  side.inv = inv;
}

Plan make_plan(const GramArgs* requests, int64_t count, const KernelTable& table) {
  Plan plan;
  int64_t vectors = 0, sums = 0;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t sides = requests[r].x.n + (requests[r].cross ? requests[r].y.n : 0);
    plan.count += requests[r].b;
    vectors += requests[r].b * sides;
    if (requests[r].want & kRowAbs) sums += requests[r].b * sides;
  }
  plan.items.reset(new Item[static_cast<size_t>(plan.count)]);
  plan.inv.resize(static_cast<size_t>(vectors));
  plan.row_sums = std::vector<std::atomic<int64_t>>(static_cast<size_t>(sums));
  double* inv = plan.inv.data();
  std::atomic<int64_t>* row_sums = plan.row_sums.data();
  Item* item = plan.items.get();
  for (int64_t r = 0; r < count; ++r) {
    const GramArgs& request = requests[r];
    for (int64_t index = 0; index < request.b; ++index, ++item) {
      item->request = &request;
      item->index = index;
      item->kind = choose_kind(request, table);
      place_side(item->x, request.x, request, index, inv);
      inv += request.x.n;
      if (request.want & kRowAbs) item->row_sum_x = row_sums, row_sums += request.x.n;
      if (request.cross) {
        place_side(item->y, request.y, request, index, inv);
        inv += request.y.n;
        if (request.want & kRowAbs) item->row_sum_y = row_sums, row_sums += request.y.n;
      }
    }
    const double m = static_cast<double>(request.cross ? 2 * request.y.n : request.x.n);
    plan.flop += static_cast<double>(request.b * request.x.n * request.d) * (request.want ? m : 1.0);
  }
  return plan;
}

void measure_all(Plan& plan, const KernelTable& table, int threads) {
  struct Piece {
    Item* item;
    Side* side;
    int64_t first, count;
  };
  std::vector<Piece> pieces;
  pieces.reserve(static_cast<size_t>(plan.count));
  for (int64_t i = 0; i < plan.count; ++i) {
    Item& item = plan.items[static_cast<size_t>(i)];
    for (Side* side : {&item.x, &item.y}) {
      for (int64_t first = 0; first < side->view.n; first += kVectorsAtOnce) {
        pieces.push_back({&item, side, first, std::min(kVectorsAtOnce, side->view.n - first)});
      }
    }
  }
  run_team(threads, static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    measure_lengths(table, *piece.item, *piece.side, piece.first, piece.count);
  });
}

void add_row_sums(std::atomic<int64_t>* sums, const double* local, int64_t count, int scale) {
  for (int64_t i = 0; i < count; ++i) {
    // integers: the order in which threads add them cannot change the sum
    sums[i].fetch_add(static_cast<int64_t>(std::llrint(std::ldexp(local[i], scale))), std::memory_order_relaxed);
  }
}

FoldBlock fold_of(const KernelTable& table, Kind kind) {
  return kind == Kind::f64 ? table.fold_f64 : kind == Kind::bf16 ? table.fold_bf16 : table.fold_f32;
}

// One task of one item, on the thread that drew it.
void fold_task(const KernelTable& table, const Item& item, int64_t entry, uint64_t call, const Layout& layout,
               char* workspace, Partial& out) {
  const GramArgs& request = *item.request;
  const BlockPair at = request.cross ? rectangle_pair(entry, item.row_blocks) : triangle_pair(entry, item.row_blocks);
  double left_abs[kMaxBlock], right_abs[kMaxBlock];
  BlockTask task{};
  task.left = &item.x.view;
  task.right = &item.right().view;
  task.row0 = at.row * item.block;
  task.rows = std::min(item.block, item.x.view.n - task.row0);
  task.col0 = at.col * item.block;
  task.cols = std::min(item.block, item.right().view.n - task.col0);
  task.diagonal = !request.cross && at.row == at.col;
  task.dtype = request.dtype;
  task.d = request.d;
  task.want = request.want;
  task.bins = request.bins;
  task.right_key = call + static_cast<uint64_t>(at.col);
  task.strip = workspace + layout.strip;
  task.strip_bytes = layout.strip_bytes;
  if (request.want & kRowAbs) {
    std::fill_n(left_abs, task.rows, 0.0);
    std::fill_n(right_abs, task.cols, 0.0);
    task.left_abs = left_abs;
    task.right_abs = right_abs;
  }
  if (request.want & kHist) {
    task.hist = reinterpret_cast<int64_t*>(workspace + layout.hist);
    std::fill_n(task.hist, task.bins, int64_t{0});
  }
  fold_of(table, item.kind)(task, workspace, out);
  if ((request.want & kRowAbs) && !item.row_overflow) {
    add_row_sums(item.row_sum_x + task.row0, left_abs, task.rows, item.row_scale);
    add_row_sums((request.cross ? item.row_sum_y : item.row_sum_x) + task.col0, right_abs, task.cols, item.row_scale);
  }
  if (request.want & kHist) {
    int64_t* hist = request.hist + item.index * request.bins;
    for (int32_t bin = 0; bin < task.bins; ++bin) {
      if (task.hist[bin]) __atomic_fetch_add(&hist[bin], task.hist[bin], __ATOMIC_RELAXED);
    }
  }
}

Layout lay_out(const KernelTable& table, int32_t bins, int64_t depth, int threads) {
  Layout layout{};
  layout.hist = whole_lines(table.workspace_bytes);
  layout.strip = layout.hist + whole_lines(sizeof(int64_t) * static_cast<size_t>(bins));
  // 8 bytes an element covers every arithmetic
  const size_t wanted = whole_lines(static_cast<size_t>(depth) * static_cast<size_t>(kMaxBlock) * 8);
  layout.strip_bytes = std::min(wanted, kStripsBytes / static_cast<size_t>(threads) / kLine * kLine);
  layout.total = layout.strip + layout.strip_bytes;
  return layout;
}

// Folds these items; partials of an item are joined in the order of its tasks.
void fold_items(const KernelTable& table, const std::vector<Item*>& items, std::vector<Partial>& totals, int threads) {
  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const auto cost = [&](size_t i) { return items[i]->request->d * std::min(items[i]->block, items[i]->x.view.n); };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return cost(a) > cost(b); });
  std::vector<int64_t> starts(items.size() + 1, 0), blocks(items.size() + 1, 1);
  int32_t bins = 0;
  int64_t depth = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    const Item& item = *items[order[i]];
    starts[i + 1] = starts[i] + item.tasks;
    blocks[i + 1] = blocks[i] + item.col_blocks;
    bins = std::max(bins, item.request->bins);
    if (item.col_blocks > 1) depth = std::max(depth, item.request->d);
  }
  const Layout layout = lay_out(table, bins, depth, threads);
  // keys of this call's blocks; no other call of the process uses them
  static std::atomic<uint64_t> keys{1};
  const uint64_t call = keys.fetch_add(static_cast<uint64_t>(blocks.back()), std::memory_order_relaxed);
  std::vector<Partial> partials(static_cast<size_t>(starts.back()), empty_partial());
  std::atomic<bool> starved{false};
  run_team(threads, starts.back(), [&](int64_t t) {
    char* workspace = scratch_of_this_thread().get(layout.total);
    if (workspace == nullptr) {
      starved = true;
      return;
    }
    const size_t slot = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), t) - starts.begin()) - 1;
    fold_task(table, *items[order[slot]], t - starts[slot], call + static_cast<uint64_t>(blocks[slot]), layout, workspace,
              partials[static_cast<size_t>(t)]);
  });
  if (starved) throw std::bad_alloc();
  for (size_t i = 0; i < order.size(); ++i) {
    Partial total = empty_partial();
    for (int64_t t = starts[i]; t < starts[i + 1]; ++t) merge(total, partials[static_cast<size_t>(t)]);
    totals[order[i]] = total;
  }
}

// Where every cosine vanishes, the maximum is the first pair of vectors that count.
void name_first_pair(const Item& item, Partial& total) {
  const bool all = !item.request->normalize;
  const auto next = [&](const Side& side, int64_t i) {
    while (i < side.view.n && !all && side.inv[i] == 0) ++i;
    return i;
  };
  total.abs_max = 0;
  total.i = next(item.x, 0);
  total.j = item.request->cross ? next(item.y, 0) : next(item.x, total.i + 1);
}

void write_row_sums(const Item& item, const Side& side, const std::atomic<int64_t>* sums, double* out, bool poisoned) {
  for (int64_t i = 0; i < side.view.n; ++i) {
    out[i] = poisoned ? kNaN : std::ldexp(static_cast<double>(sums[i].load(std::memory_order_relaxed)), -item.row_scale);
  }
}

void write_item(const Item& item, Partial total) {
  const GramArgs& request = *item.request;
  double* sums = request.sums + item.index * kSums;
  int64_t* counts = request.counts + item.index * kCounts;
  const int64_t nonfinite = item.x.nonfinite + item.y.nonfinite;
  if (item.tasks > 0 && total.i < 0) name_first_pair(item, total);
  const bool none = item.tasks == 0;
  sums[0] = nonfinite ? kNaN : total.abs_sum;
  sums[1] = nonfinite ? kNaN : total.sq_sum;
  sums[2] = nonfinite ? kNaN : total.sum;
  sums[3] = none ? kNaN : total.abs_max;
  sums[4] = rounds(item) ? bf16_floor(request.d) : 0.0;
  counts[0] = item.pairs;
  counts[1] = item.x.zero + item.y.zero;
  counts[2] = nonfinite;
  counts[3] = none ? -1 : total.i;
  counts[4] = none ? -1 : total.j;
  if (request.want & kRowAbs) {
    const bool poisoned = nonfinite || item.row_overflow;
    write_row_sums(item, item.x, item.row_sum_x, request.x.row_abs + item.index * request.x.n, poisoned);
    if (request.cross) {
      write_row_sums(item, item.y, item.row_sum_y, request.y.row_abs + item.index * request.y.n, poisoned);
    }
  }
  if ((request.want & kHist) && item.tasks > 0) {
    // pairs with a zero vector were counted as cosine 0
    const int32_t middle = std::min(static_cast<int32_t>(static_cast<float>(request.bins) / 2), request.bins - 1);
    request.hist[item.index * request.bins + middle] -= item.visited - item.pairs;
  }
}

// Through rounded tiles, a mean this close to the floor is wrong by more than allowed.
bool near_floor(const Item& item, const Partial& total) {
  if (!rounds(item) || item.pairs == 0) return false;
  const double mean = total.abs_sum / static_cast<double>(item.pairs), floor = bf16_floor(item.request->d);
  return 0.5 * floor * floor > kRoundingAllowed * mean * mean;
}

void forget(Item& item) {
  item.kind = Kind::f32;
  for (Side* side : {&item.x, &item.y}) {
    side->zero = side->nonfinite = 0;
    side->longest = 0;
    side->exponent.clear();
    side->view.exponent = nullptr;
    for (int64_t i = 0; i < side->view.n; ++i) side->inv[i] = side->norm_sq[i];
  }
  const GramArgs& request = *item.request;
  if (request.want & kHist) std::fill_n(request.hist + item.index * request.bins, request.bins, int64_t{0});
  if (request.want & kRowAbs) {
    for (int64_t i = 0; i < item.x.view.n; ++i) item.row_sum_x[i] = 0;
    for (int64_t i = 0; i < item.y.view.n; ++i) item.row_sum_y[i] = 0;
  }
}

}  // namespace

void gram_stats_cpu(const GramArgs* requests, int64_t count, int threads) {
  const KernelTable& table = kernels_in_force();
  for (int64_t r = 0; r < count; ++r) {
    if (requests[r].want & kHist) std::fill_n(requests[r].hist, requests[r].b * requests[r].bins, int64_t{0});
  }
  Plan plan = make_plan(requests, count, table);
  if (plan.flop < kFlopWorthAThread * threads) threads = 1 + static_cast<int>(plan.flop / kFlopWorthAThread);
  measure_all(plan, table, threads);
  run_team(threads, plan.count, [&](int64_t i) { settle(plan.items[static_cast<size_t>(i)]); });

  std::vector<Item*> items;
  items.reserve(static_cast<size_t>(plan.count));
  for (int64_t i = 0; i < plan.count; ++i) items.push_back(&plan.items[static_cast<size_t>(i)]);
  std::vector<Partial> totals(items.size(), empty_partial());
  fold_items(table, items, totals, threads);

  std::vector<Item*> again;
  for (size_t i = 0; i < items.size(); ++i) {
    if (near_floor(*items[i], totals[i])) again.push_back(items[i]);
  }
  if (!again.empty()) {
    for (Item* item : again) {
      forget(*item);
      settle(*item);
    }
    std::vector<Partial> exact(again.size(), empty_partial());
    fold_items(table, again, exact, threads);
    for (size_t i = 0, a = 0; i < items.size(); ++i) {
      if (a < again.size() && items[i] == again[a]) totals[i] = exact[a++];
    }
  }
  for (size_t i = 0; i < items.size(); ++i) write_item(*items[i], totals[i]);
}

}  // namespace orthofast
