// The CPU driver of gradients: rounds of block pairs in which no block comes twice, so that each is added to in one order.
//
// A tournament: within a round threads work on different lines of the gradient, and a task of a later round begins when
// its own two blocks are free. Each block is added to in the order of the list, so the bits do not depend on the threads.
// Extra memory  one sum a task at hand, one counter a block, one workspace (about 1.2 MiB) a thread.
#include "../core/pair_gradient.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "isa.h"
#include "team.h"

namespace orthofast {
namespace {

constexpr double kFlopWorthAThread = 2e6;  // as in gram_stats_cpu.cpp
constexpr int64_t kVectorsAtOnce = 64;     // finished at a time
constexpr int64_t kGrain = 48;             // a block is a multiple of every panel
constexpr int64_t kTasksAtOnce = 4096;     // listed at a time

struct Pairing {
  int64_t item, row, col;
};

// A pairing and how often each of its two blocks comes before it in the list.
struct Listed {
  Pairing at;
  int64_t left, right;  // counters of the two blocks; the same one where a block meets itself
  int32_t left_turn, right_turn;
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

// Tasks in the order in which they add to the blocks they share.
class TaskList {
 public:
  TaskList(int64_t blocks) : turns_(static_cast<size_t>(blocks)), done_(static_cast<size_t>(blocks)) {}

  int64_t size() const { return static_cast<int64_t>(tasks_.size()); }

  void add(const Pairing& at, int64_t left, int64_t right) {
    tasks_.push_back({at, left, right, turns_[static_cast<size_t>(left)], turns_[static_cast<size_t>(right)]});
    ++turns_[static_cast<size_t>(left)];
    if (right != left) ++turns_[static_cast<size_t>(right)];
  }

  // Runs and forgets the tasks, and adds their sums to their items in order. A task waits for earlier ones alone, and
  // these are drawn before it: whoever is waited for is at work.
  void run(const GradientArgs& args, const GradientTable& table, const Cut& left, const Cut& right, int threads) {
    std::vector<double> sums(tasks_.size());
    std::atomic<bool> starved{false};
    run_team(threads, size(), [&](int64_t t) {
      const Listed& listed = tasks_[static_cast<size_t>(t)];
      auto& left_done = done_[static_cast<size_t>(listed.left)].count;
      auto& right_done = done_[static_cast<size_t>(listed.right)].count;
      while (left_done.load(std::memory_order_acquire) != listed.left_turn ||
             right_done.load(std::memory_order_acquire) != listed.right_turn) {
        std::this_thread::yield();
      }
      char* workspace = scratch_of_this_thread().get(table.workspace_bytes);
      if (workspace == nullptr) {
        starved = true;
      } else {
        const GradientTask task = task_of(args, listed.at, left, right);
        sums[static_cast<size_t>(t)] = (args.wide ? table.block_f64 : table.block_f32)(task, workspace);
      }
      left_done.store(listed.left_turn + 1, std::memory_order_release);
      right_done.store(listed.right_turn + 1, std::memory_order_release);
    });
    for (size_t t = 0; t < tasks_.size(); ++t) {
      const Listed& listed = tasks_[t];
      args.totals[listed.at.item] += sums[t];
      for (const int64_t block : {listed.left, listed.right}) {
        turns_[static_cast<size_t>(block)] = 0;
        done_[static_cast<size_t>(block)].count = 0;
      }
    }
    tasks_.clear();
    if (starved) throw std::bad_alloc();
  }

 private:
  struct Counter {
    std::atomic<int32_t> count{0};
  };

  std::vector<Listed> tasks_;
  std::vector<int32_t> turns_;  // of each block: its tasks in the list so far
  std::vector<Counter> done_;   // of these, those that have run
};

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
  TaskList tasks(args.b * (left.count + (args.cross ? right.count : 0)));
  for (int64_t r = 0; r < rounds; ++r) {
    for (int64_t item = 0; item < args.b; ++item) {
      const int64_t first = item * left.count;
      const int64_t first_right = args.cross ? args.b * left.count + item * right.count : first;
      const auto add = [&](int64_t row, int64_t col) { tasks.add({item, row, col}, first + row, first_right + col); };
      if (args.cross) {
        pairs_between(left.count, right.count, r, add);
      } else {
        pairs_within(left.count, r, add);
      }
      if (tasks.size() >= kTasksAtOnce) tasks.run(args, table, left, right, threads);
    }
  }
  tasks.run(args, table, left, right, threads);
  finish(args, args.x, table, threads);
  if (args.cross) finish(args, args.y, table, threads);
}

}  // namespace orthofast
