// The CPU driver of gradients: rounds of block pairs in which no block comes twice, so that each is added to in one order.
//
// A tournament: within a round threads work on different lines of the gradient, and rounds follow one another; the bits
// do not depend on the threads.  Extra memory  one sum a task of a round, one workspace (about 1.2 MiB) a thread.
#include "../core/pair_gradient.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "isa.h"
#include "team.h"

namespace orthofast {
namespace {

constexpr double kFlopWorthAThread = 2e6;  // as in gram_stats_cpu.cpp
constexpr int64_t kVectorsAtOnce = 64;     // finished at a time
constexpr int64_t kGrain = 48;             // a block is a multiple of every panel
constexpr int64_t kTasksAtOnce = 4096;     // of many small items

struct Pairing {
  int64_t item, row, col;
};

// Blocks of one side, all of `size` vectors but the last.
struct Cut {
  int64_t n, size, count;
};

// Even shares of at most kMaxGradientBlock, from the number of vectors alone.
Cut cut(int64_t n) {
  if (n == 0) return Cut{0, kGrain, 0};
  const int64_t parts = (n + kMaxGradientBlock - 1) / kMaxGradientBlock;
  const int64_t size = ((n + parts - 1) / parts + kGrain - 1) / kGrain * kGrain;
  return Cut{n, size, (n + size - 1) / size};
}

// Round r of the circle method. An odd block out meets itself; with an even number all meet themselves in a round more.
template <class Add>
void pairs_within(int64_t blocks, int64_t r, const Add& add) {
  const int64_t circle = blocks % 2 ? blocks : blocks - 1;
  if (r == circle) {
    for (int64_t i = 0; i < blocks; ++i) add(i, i);
    return;
  }
  add(blocks % 2 ? r : std::min(r, circle), blocks % 2 ? r : circle);
  for (int64_t k = 1; k <= (circle - 1) / 2; ++k) {
    const int64_t i = (r + k) % circle, j = (r + circle - k) % circle;
    add(std::min(i, j), std::max(i, j));
  }
}

// Round r of all rows against all columns: a Latin square.
template <class Add>
void pairs_between(int64_t rows, int64_t cols, int64_t r, const Add& add) {
  const int64_t circle = std::max(rows, cols);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t j = (i + r) % circle;
    if (j < cols) add(i, j);
  }
}

const char* item_of(const void* data, int64_t elements, bool wide) {
  return static_cast<const char*>(data) + elements * (wide ? 8 : 4);
}
char* item_of(void* data, int64_t elements, bool wide) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + elements * (wide ? 8 : 4);
}

GradientTask task_of(const GradientArgs& args, const Pairing& at, const Cut& left, const Cut& right) {
  const Units& other = args.cross ? args.y : args.x;
  GradientTask task{};
  task.left = item_of(args.x.units, at.item * args.x.n * args.d, args.wide);
  task.right = item_of(other.units, at.item * other.n * args.d, args.wide);
  task.left_gradient = item_of(args.x.gradient, at.item * args.x.n * args.d, args.wide);
  task.right_gradient = item_of(other.gradient, at.item * other.n * args.d, args.wide);
  task.n_left = left.n;
  task.n_right = right.n;
  task.row0 = at.row * left.size;
  task.rows = std::min(left.size, left.n - task.row0);
  task.col0 = at.col * right.size;
  task.cols = std::min(right.size, right.n - task.col0);
  task.d = args.d;
  task.diagonal = !args.cross && at.row == at.col;
  task.curve = args.curve;
  task.width = args.width;
  return task;
}

// Runs these tasks, no two of which share a block, and adds their sums to their items in order.
void run_tasks(const GradientArgs& args, const GradientTable& table, const Cut& left, const Cut& right,
               const std::vector<Pairing>& tasks, int threads) {
  std::vector<double> sums(tasks.size());
  std::atomic<bool> starved{false};
  run_team(threads, static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    char* workspace = scratch_of_this_thread().get(table.workspace_bytes);
    if (workspace == nullptr) {
      starved = true;
      return;
    }
    const GradientTask task = task_of(args, tasks[static_cast<size_t>(t)], left, right);
    sums[static_cast<size_t>(t)] = (args.wide ? table.block_f64 : table.block_f32)(task, workspace);
  });
  if (starved) throw std::bad_alloc();
  for (size_t t = 0; t < tasks.size(); ++t) args.totals[tasks[t].item] += sums[t];
}

void finish(const GradientArgs& args, const Units& side, const GradientTable& table, int threads) {
  if (side.gradient == nullptr) return;
  const int64_t vectors = args.b * side.n;
  run_team(threads, (vectors + kVectorsAtOnce - 1) / kVectorsAtOnce, [&](int64_t piece) {
    const int64_t first = piece * kVectorsAtOnce;
    (args.wide ? table.radial_f64 : table.radial_f32)(
        item_of(side.units, first * args.d, args.wide), item_of(side.gradient, first * args.d, args.wide),
        side.inverse + first, std::min(kVectorsAtOnce, vectors - first), args.d);
  });
}

}  // namespace

void pair_gradient_cpu(const GradientArgs& args, int threads) {
  const GradientTable& table = kernels_in_force().gradient;
  const Cut left = cut(args.x.n), right = args.cross ? cut(args.y.n) : left;
  std::fill_n(args.totals, args.b, 0.0);
  const double flop = 3.0 * static_cast<double>(args.b * left.n * args.d) * static_cast<double>(args.cross ? 2 * right.n : left.n);
  if (flop < kFlopWorthAThread * threads) threads = 1 + static_cast<int>(flop / kFlopWorthAThread);
  const int64_t rounds = args.cross ? std::max(left.count, right.count) : left.count;
  std::vector<Pairing> tasks;
  for (int64_t r = 0; r < rounds; ++r) {
    for (int64_t item = 0; item < args.b; ++item) {
      const auto add = [&](int64_t row, int64_t col) { tasks.push_back({item, row, col}); };
      if (args.cross) {
        pairs_between(left.count, right.count, r, add);
      } else {
        pairs_within(left.count, r, add);
      }
      if (static_cast<int64_t>(tasks.size()) >= kTasksAtOnce || item + 1 == args.b) {
        run_tasks(args, table, left, right, tasks, threads);
        tasks.clear();
      }
    }
  }
  finish(args, args.x, table, threads);
  if (args.cross) finish(args, args.y, table, threads);
}

}  // namespace orthofast
