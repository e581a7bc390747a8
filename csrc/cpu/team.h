// A team of threads that draw numbered pieces of work from one queue.
//
// With OpenMP the pool is the one torch uses (both name libgomp.so.1), so no second pool competes for the cores.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#ifndef _OPENMP
#include <thread>
#include <vector>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace orthofast {
namespace {

// Runs work(0) .. work(count - 1) on at most `threads` threads; work must not throw.
template <class Work>
void run_team(int threads, int64_t count, const Work& work) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto draw = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  };
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  draw();
#else
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads - 1));
  for (int t = 1; t < threads; ++t) others.emplace_back(draw);
  draw();
  for (auto& other : others) other.join();
#endif
}

// Scratch memory of one thread, kept between calls: fresh pages cost more than small folds do.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  char* get(size_t bytes) noexcept {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + kHuge - 1) / kHuge * kHuge;
      memory_ = static_cast<char*>(std::aligned_alloc(kHuge, size_));
      if (memory_ == nullptr) {
        size_ = 0;
        return nullptr;
      }
      std::memset(memory_, 0, kCleared);
#ifdef __linux__
      madvise(memory_, size_, MADV_HUGEPAGE);  // advice only
#endif
    }
    return memory_;
  }

 private:
  static constexpr size_t kCleared = 4096;  // what a fresh workspace starts with must not look like a key
  static constexpr size_t kHuge = size_t{2} << 20;
  char* memory_ = nullptr;
  size_t size_ = 0;
};

inline Scratch& scratch_of_this_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace
}  // namespace orthofast
