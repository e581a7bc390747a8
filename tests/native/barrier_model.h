// A model of one cluster of the Hopper fold: barriers, copy engines and warps, whose next steps come in random order.
//
// It walks the ring, parities, arrival counts and byte counts of csrc/cuda/layout.h as csrc/cuda/fold.cuh does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda/layout.h"

void expect(bool holds, const std::string& what);

namespace orthofast {
namespace cuda {

struct Barrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void init(int arrivals) { count = pending = arrivals; }
  void settle() {
    if (pending > 0 || bytes != 0) return;
    phase ^= 1;
    pending = count;
  }
  void arrive(int64_t announced = 0) {
    bytes += announced;
    expect(pending > 0, "no more arrivals than the barrier counts");
    --pending;
    settle();
  }
  void complete(int64_t arrived) {
    bytes -= arrived;
    settle();
  }
  bool passed(uint32_t parity) const { return phase != parity; }
};

// The k-steps every block walks: (entry, step) numbered through.
template <typename Tile>
class Machine {
 public:
  Machine(const std::vector<int>& steps, uint64_t seed) : random_(seed) {
    for (int count : steps) total_ += count;
    for (int c = 0; c < Tile::kCluster; ++c) {
      for (int s = 0; s < Tile::kStages; ++s) {
        full_[c][s].init(1);
        empty_[c][s].init(Tile::kEmptyArrivals);
        for (int box = 0; box < 1 + Tile::kCluster; ++box) slot_[c][s][box] = -1;
        readers_[c][s] = 0;
      }
    }
    for (int count : steps) {
      for (int s = 0; s < count; ++s) last_of_entry_.push_back(s + 1 == count);
    }
  }

  // Random order of all that can happen next; false if nothing can and work is left.
  bool run() {
    for (int64_t idle = 0; idle < 4000;) {
      if (finished()) break;
      idle = turn() ? 0 : idle + 1;
    }
    if (!finished()) return false;
    expect(flying_.empty(), "no copy is under way when blocks leave");
    for (int c = 0; c < Tile::kCluster; ++c) {
      for (int s = 0; s < Tile::kStages; ++s) expect(full_[c][s].bytes == 0, "every announced byte came");
    }
    return true;
  }

 private:
  struct Copy {
    int block, stage, box, step;
    int64_t bytes;
  };
  struct Walker {
    Ring ring;
    int step = 0, held = -1;
    bool pending = false;  // has products under way that a later turn releases
  };

  bool finished() const {
    for (int c = 0; c < Tile::kCluster; ++c) {
      if (producer_[c].step < total_) return false;
      for (const Walker& warp : consumer_[c]) {
        if (warp.step < total_ || warp.held >= 0) return false;
      }
    }
    return true;
  }

  bool turn() {
    const int choice = static_cast<int>(random_() % (Tile::kCluster * (1 + kConsumerWarps) + 4));
    if (choice < Tile::kCluster) return produce(choice);
    const int warp = choice - Tile::kCluster;
    if (warp < Tile::kCluster * kConsumerWarps) return consume(warp / kConsumerWarps, warp % kConsumerWarps);
    if (flying_.empty()) return false;
    const size_t which = random_() % flying_.size();
    const Copy copy = flying_[which];
    flying_.erase(flying_.begin() + static_cast<std::ptrdiff_t>(which));
    expect(readers_[copy.block][copy.stage] == 0, "no copy lands where a warp still reads");
    slot_[copy.block][copy.stage][copy.box] = copy.step;
    full_[copy.block][copy.stage].complete(copy.bytes);
    return true;
  }

  bool produce(int c) {
    Walker& at = producer_[c];
    if (at.step == total_ || !empty_[c][at.ring.stage].passed(producer_parity(at.ring))) return false;
    full_[c][at.ring.stage].arrive(Tile::kStageBytes);
    flying_.push_back(Copy{c, at.ring.stage, 0, at.step, kBoxBytes});
    for (int to = 0; to < Tile::kCluster; ++to) flying_.push_back(Copy{to, at.ring.stage, 1 + c, at.step, kBoxBytes});
    at.ring.template advance<Tile::kStages>();
    ++at.step;
    return true;
  }

  void let_go(int c, Walker& at) {
    --readers_[c][at.held];
    for (int to = 0; to < Tile::kCluster; ++to) empty_[to][at.held].arrive();
    at.held = -1;
  }

  bool consume(int c, int warp) {
    Walker& at = consumer_[c][warp];
    if (at.held >= 0 && (at.step == total_ || last_of_entry_[static_cast<size_t>(at.step - 1)])) {
      let_go(c, at);  // the entry is done: all products are awaited
      return true;
    }
    if (at.step == total_ || !full_[c][at.ring.stage].passed(consumer_parity(at.ring))) return false;
    for (int box = 0; box < 1 + Tile::kCluster; ++box) {
      expect(slot_[c][at.ring.stage][box] == at.step, "a warp reads the step it means, box " + std::to_string(box));
    }
    ++readers_[c][at.ring.stage];
    if (at.held >= 0) let_go(c, at);  // one group of products stays under way
    at.held = at.ring.stage;
    at.ring.template advance<Tile::kStages>();
    ++at.step;
    return true;
  }

  std::mt19937_64 random_;
  int total_ = 0;
  std::vector<bool> last_of_entry_;
  Barrier full_[2][8], empty_[2][8];
  int slot_[2][8][3], readers_[2][8];
  Walker producer_[2], consumer_[2][kConsumerWarps];
  std::vector<Copy> flying_;
};

}  // namespace cuda
}  // namespace orthofast
