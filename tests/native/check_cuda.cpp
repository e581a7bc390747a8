// The Hopper fold as far as a host can run it: work list, fragments, operand layout, tables, and the protocol of its
// barriers on a model of two blocks and their copy engines.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "barrier_model.h"
#include "cuda/layout.h"
#include "cuda/plan.h"

using namespace orthofast;
using namespace orthofast::cuda;

namespace {
int failures = 0;
}

void expect(bool holds, const std::string& what) {
  if (holds) return;
  if (++failures <= 40) std::printf("FAILED %s\n", what.c_str());
}

namespace {

// --- work list ---------------------------------------------------------------------------------------------------

void check_list(int64_t n, int64_t m, bool within, int64_t edge) {
  const std::string name = "list n" + std::to_string(n) + " m" + std::to_string(m) + (within ? " within" : " cross");
  const int64_t rows = row_tiles(n, edge, within), cols = block_count(m, edge);
  std::vector<int> seen(static_cast<size_t>(n * m), 0);
  int64_t band = 0, row = 0, col = -1;
  for (int64_t e = 0; e < band_entries(rows, cols, within); ++e) {
    const WorkEntry entry = pack_entry(7, band_pair(e, rows, cols, within));
    const BlockPair tile = unpack_tiles(entry.tiles);
    expect(entry.problem == 7 && tile.row >= 0 && tile.row < rows && tile.col < cols, name + " inside");
    // bands of 8 columns, rows outer, columns inner
    const bool later = tile.col / 8 > band || (tile.col / 8 == band && (tile.row > row || (tile.row == row && tile.col > col)));
    expect(later, name + " order");
    band = tile.col / 8, row = tile.row, col = tile.col;
    for (int64_t i = tile.row * edge; i < std::min(n, (tile.row + 1) * edge); ++i) {
      for (int64_t j = tile.col * edge; j < std::min(m, (tile.col + 1) * edge); ++j) {
        if (!within || j > i) ++seen[static_cast<size_t>(i * m + j)];
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      expect(seen[static_cast<size_t>(i * m + j)] == (within ? j > i : 1), name + " covers each pair once");
    }
  }
}

void check_lists() {
  for (int64_t n = 1; n <= 120; ++n) check_list(n, n, true, 4);
  for (int64_t n : {1, 3, 4, 5, 35, 36, 37}) {
    for (int64_t m : {1, 31, 32, 33, 64, 65, 97}) check_list(n, m, false, 4);
  }
  const BlockPair far = unpack_tiles(pack_entry(0, BlockPair{32767, 32767}).tiles);
  expect(far.row == 32767 && far.col == 32767, "the last tile survives packing");
  const int64_t tiles = 32767;
  const BlockPair last = band_pair(band_entries(tiles, tiles, true) - 1, tiles, tiles, true);
  expect(last.row == tiles - 1 && last.col == tiles - 1, "last entry of the largest list");
}

// --- fragments ---------------------------------------------------------------------------------------------------

void check_fragments(int columns) {
  std::vector<int> seen(static_cast<size_t>(64 * columns), 0);
  for (int thread = 0; thread < 128; ++thread) {
    for (int r = 0; r < 64 * columns / 128; ++r) {
      const int row = fragment_row(thread, r), col = fragment_column(thread, r);
      expect(row >= 0 && row < 64 && col >= 0 && col < columns, "fragment inside");
      ++seen[static_cast<size_t>(row * columns + col)];
    }
  }
  for (int count : seen) expect(count == 1, "fragments cover the tile once");
  // the PTX manual's figure of D: thread 5 of warp 2, registers 0 to 3 and 4
  expect(fragment_row(69, 0) == 33 && fragment_column(69, 0) == 2, "register 0 of thread 69");
  expect(fragment_row(69, 1) == 33 && fragment_column(69, 1) == 3, "register 1 of thread 69");
  expect(fragment_row(69, 2) == 41 && fragment_column(69, 2) == 2, "register 2 of thread 69");
  expect(fragment_row(69, 4) == 33 && fragment_column(69, 4) == 10, "register 4 of thread 69");
}

// The halving of column sums as the epilogue's shuffles do it, with one number per column and row.
void check_column_sums() {
  double value[32][8], want[32] = {};
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < 8; ++v) {
      const int column = fragment_column(lane, 4 * (v / 2) + v % 2);
      value[lane][v] = 1 + 100 * column + 7 * (lane / 4);
      want[column] += value[lane][v];
    }
  }
  for (int width = 4, step = 16; width > 0; width >>= 1, step >>= 1) {
    double give[32][4];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < width; ++i) {
        const bool upper = (lane & step) != 0;
        give[lane][i] = upper ? value[lane][i] : value[lane][i + width];
        value[lane][i] = upper ? value[lane][i + width] : value[lane][i];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < width; ++i) value[lane][i] += give[lane ^ step][i];
    }
  }
  std::set<int> kept;
  for (int lane = 0; lane < 32; ++lane) {
    kept.insert(kept_column(lane));
    expect(value[lane][0] == want[kept_column(lane)], "lane " + std::to_string(lane) + " keeps its column");
  }
  expect(kept.size() == 32, "every column is kept once");
}

// --- operands in shared memory -------------------------------------------------------------------------------------

// What the copy engine writes: rows of 128 bytes, 16-byte pieces exchanged within each 1024 bytes.
void copy_rows(std::vector<uint16_t>& shared, uint32_t to, int rows, const std::vector<uint16_t>& box) {
  for (int row = 0; row < rows; ++row) {
    for (int piece = 0; piece < 8; ++piece) {
      const uint32_t at = to + static_cast<uint32_t>(row * 128 + (piece ^ (row % 8)) * 16);
      std::memcpy(&shared[at / 2], &box[static_cast<size_t>(row * 64 + piece * 8)], 16);
    }
  }
}

// What wgmma reads at (vector, k) of a 16-k slice, from the descriptor's bits alone.
uint16_t fetch(const std::vector<uint16_t>& shared, uint64_t descriptor, bool mn_major, int vector, int k) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  expect(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0, "128-byte swizzle, no base offset");
  uint32_t at = 0;
  if (mn_major) {  // ((8, 8, m), (8, k)) : ((1, 8, leading), (64, stride)), in elements and bytes
    at = start + static_cast<uint32_t>(vector / 64) * leading + static_cast<uint32_t>(vector % 64 * 2 + k % 8 * 128) +
         static_cast<uint32_t>(k / 8) * stride;
  } else {  // ((8, n), 16) : ((128 bytes, stride), 1)
    at = start + static_cast<uint32_t>(vector / 8) * stride + static_cast<uint32_t>(vector % 8 * 128 + k * 2);
  }
  at ^= (at >> 7 & 7) << 4;
  return shared[at / 2];
}

template <typename Tile>
void check_operands(bool mn_major) {
  const std::string name = std::string(mn_major ? "columns" : "rows") + " tile " + std::to_string(Tile::kEdge);
  std::vector<uint16_t> shared(static_cast<size_t>(Tile::kStages * Tile::kStageBytes / 2));
  const auto element = [](int side, int vector, int k) { return static_cast<uint16_t>(side << 15 | vector << 6 | k); };
  const uint32_t stage = (Tile::kStages - 1) * Tile::kStageBytes;  // any multiple of 1024
  // box 0: own rows; box 1 + r: the columns that block r sends
  for (int box = 0; box < 1 + Tile::kCluster; ++box) {
    const uint32_t to = stage + static_cast<uint32_t>(box * kBoxBytes);
    const int side = box > 0, first = box > 0 ? (box - 1) * kBoxVectors : 0;
    for (int c = 0; c < (mn_major ? 2 : 1); ++c) {
      const int rows = mn_major ? kStepK : kBoxVectors;
      std::vector<uint16_t> values(static_cast<size_t>(rows * 64));
      for (int row = 0; row < rows; ++row) {
        for (int i = 0; i < 64; ++i) {
          values[static_cast<size_t>(row * 64 + i)] =
              mn_major ? element(side, first + c * kChunkVectors + i, row) : element(side, first + row, i);
        }
      }
      copy_rows(shared, to + static_cast<uint32_t>(c * kChunkBytes), rows, values);
    }
  }
  for (int step = 0; step < kStepK / kMmaK; ++step) {
    for (int k = 0; k < kMmaK; ++k) {
      for (int group = 0; group < kConsumerGroups; ++group) {
        const uint64_t a = operand_descriptor(stage + group_offset(group), mn_major) + static_cast<uint64_t>(step) * descriptor_step(mn_major);
        for (int row = 0; row < kMmaRows; ++row) {
          expect(fetch(shared, a, mn_major, row, k) == element(0, 64 * group + row, step * kMmaK + k), name + ": A");
        }
      }
      const uint64_t b = operand_descriptor(stage + kBoxBytes, mn_major) + static_cast<uint64_t>(step) * descriptor_step(mn_major);
      for (int col = 0; col < Tile::kColumns; ++col) {
        expect(fetch(shared, b, mn_major, col, k) == element(1, col, step * kMmaK + k), name + ": B");
      }
    }
  }
  for (int vector = 0; vector < kBoxVectors; ++vector) {
    for (int k = 0; k < kStepK; ++k) {
      const uint32_t at = mn_major ? mn_major_byte(vector, k) : k_major_byte(vector, k);
      expect(shared[(stage + at) / 2] == element(0, vector, k), name + ": byte of an element");
    }
  }
}

// --- barriers ------------------------------------------------------------------------------------------------------

template <typename Tile>
void check_barriers() {
  std::mt19937_64 random(5);
  for (int trial = 0; trial < 120; ++trial) {
    std::vector<int> steps(1 + random() % 5);
    for (int& count : steps) count = 1 + static_cast<int>(random() % 9);
    Machine<Tile> machine(steps, random());
    expect(machine.run(), "barriers of tile " + std::to_string(Tile::kEdge) + ": no deadlock");
  }
}

// --- tables --------------------------------------------------------------------------------------------------------

GramArgs request_of(int64_t b, int64_t n, int64_t m, int64_t d, Dtype dtype, bool columns) {
  GramArgs args{};
  const auto side = [&](int64_t vectors, uintptr_t at) {
    const int64_t inner = columns ? vectors : d, pitch = (inner + 15) / 16 * 16;
    return Vectors{reinterpret_cast<const void*>(at), vectors, pitch * (columns ? d : vectors), columns ? 1 : pitch,
                   columns ? pitch : 1, nullptr, nullptr};
  };
  args.x = side(n, 1 << 20);
  args.cross = m >= 0;
  if (args.cross) args.y = side(m, 1 << 24);
  args.normalize = true;
  args.dtype = dtype;
  args.want = kAbsSum;
  args.b = b;
  args.d = d;
  return args;
}

void check_plan() {
  std::vector<GramArgs> requests;
  for (const bool columns : {false, true}) {
    requests.push_back(request_of(1, 3000, -1, 100, Dtype::bf16, columns));
    requests.push_back(request_of(5, 64, -1, 576, Dtype::bf16, columns));
    requests.push_back(request_of(2, 300, 513, 4096, Dtype::f16, columns));
    requests.push_back(request_of(1, 1, -1, 77, Dtype::f32, columns));
    requests.push_back(request_of(3, 257, -1, 65, Dtype::f32, columns));
    requests.push_back(request_of(1, 129, 40, 9, Dtype::e4m3fn, columns));
  }
  requests[3].precision = requests[4].precision = Precision::high;
  requests[1].want |= kRowAbs;
  const uintptr_t base = 1 << 30;
  const Plan plan = make_plan(requests.data(), static_cast<int64_t>(requests.size()), 132, base);
  const Plan sized = make_plan(requests.data(), static_cast<int64_t>(requests.size()), 132, 0);
  expect(plan.bytes == sized.bytes && plan.rounds, "the size does not depend on the address");
  const std::vector<WorkEntry> list = list_entries(plan);
  expect(static_cast<int64_t>(list.size()) == plan.tables.entry_count, "the list is as long as announced");
  int64_t at = 0;
  for (const Launch& launch : plan.launches) {
    expect(launch.first == at && launch.last > at, "launches follow one another");
    at = launch.last;
  }
  expect(at == plan.tables.entry_count, "launches cover the list");
  int64_t d = std::numeric_limits<int64_t>::max();
  for (const RequestTable& row : plan.requests) {
    bool opens = false;
    for (const Launch& launch : plan.launches) opens |= launch.first == row.first_entry;
    expect(opens || row.d <= d, "long vectors first in each launch");
    d = row.d;
    const bool large = row.cluster == 2;
    for (const Launch& launch : plan.launches) {
      if (row.first_entry >= launch.first && row.first_entry < launch.last && row.entries > 0) {
        expect(launch.large == large, "a request's tiles are its launch's");
      }
    }
  }
  // regions of the workspace, sorted: none overlaps the next
  std::vector<std::pair<uintptr_t, uintptr_t>> regions;
  const auto region = [&](const void* from, int64_t bytes) {
    regions.emplace_back(reinterpret_cast<uintptr_t>(from), reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes));
  };
  const CallTables& tables = plan.tables;
  region(tables.sides, tables.side_count * static_cast<int64_t>(sizeof(SideTable)));
  region(tables.requests, tables.request_count * static_cast<int64_t>(sizeof(RequestTable)));
  region(tables.maps, tables.side_count * kMapBytes);
  region(tables.problems, tables.problem_count * static_cast<int64_t>(sizeof(Problem)));
  region(tables.entries, tables.entry_count * 8);
  region(tables.redo, tables.problem_count * 4);
  for (const float* sums : {tables.abs_sum, tables.sq_sum, tables.sum}) region(sums, tables.entry_count * kSlots * 4);
  region(tables.best, tables.entry_count * kSlots * 12);
  for (size_t s = 0; s < plan.sides.size(); ++s) {
    const SideTable& side = plan.sides[s];
    const MapPlan& map = plan.maps[s];
    region(side.inverse, side.b * side.padded * 4);
    expect(side.padded >= side.n && side.padded % kPad == 0, "inverses reach to the end of every tile");
    if (side.kind != Operand::exact) {
      region(side.operand, static_cast<int64_t>(map.size[2] * map.stride[1]));
      expect(static_cast<int64_t>(map.size[2]) == side.b * (side.kind == Operand::converted ? 1 : 2), "high and low parts");
    }
    expect(reinterpret_cast<uintptr_t>(map.address) % 16 == 0 && map.stride[0] % 16 == 0 && map.stride[1] % 16 == 0,
           "the copy engine's alignment");
    expect(map.box[0] * 2 == 128 && map.box[1] <= 256 && map.box[2] == 1, "the copy engine's box");
    expect(static_cast<int64_t>(map.size[0] * map.size[1]) == side.n * side.d, "a map covers its vectors");
    expect(map.stride[0] >= 2 * map.size[0], "rows do not overlap");
  }
  for (const RequestTable& row : plan.requests) {
    const SideTable &x = plan.sides[static_cast<size_t>(row.side_x)], &y = plan.sides[static_cast<size_t>(row.side_y)];
    region(row.row_slots, row.b * row.col_tiles * x.padded * 4);
    region(row.col_slots, row.b * row.row_tiles * row.cluster * y.padded * 4);
  }
  std::sort(regions.begin(), regions.end());
  for (size_t r = 0; r < regions.size(); ++r) {
    expect(regions[r].first % 256 == 0 && regions[r].first >= base, "regions are aligned");
    expect(regions[r].second <= (r + 1 < regions.size() ? regions[r + 1].first : base + static_cast<uintptr_t>(plan.bytes)),
           "regions do not overlap");
  }
}

void check_choice() {
  const auto large = [](int64_t n, int64_t d) {
    const GramArgs args = request_of(1, n, -1, d, Dtype::bf16, false);
    return make_plan(&args, 1, 132, 0).launches.at(0).large;
  };
  expect(large(8192, 8192) && large(28672, 8192), "large sets take pairs of blocks");
  expect(!large(4096, 4096), "4096 vectors fill four waves of small tiles");
  expect(!large(64, 576) && !large(128, 64), "one small tile holds a small set");
}

void check_refusals() {
  const auto refused = [](auto change) {
    GramArgs args = request_of(2, 64, -1, 64, Dtype::bf16, false);
    change(args);
    bool threw = false;
    try {
      make_plan(&args, 1, 132, 0);
    } catch (const std::invalid_argument&) {
      threw = true;
    }
    expect(threw == !refusal(args).empty(), "a plan is refused with the sentence");
    return threw;
  };
  expect(!refused([](GramArgs&) {}), "a plain request is served");
  expect(refused([](GramArgs& a) { a.dtype = Dtype::f64; }), "float64");
  expect(refused([](GramArgs& a) { a.dtype = Dtype::e5m2fnuz; }), "fnuz");
  expect(refused([](GramArgs& a) { a.precision = Precision::float64; }), "float64 arithmetic");
  expect(refused([](GramArgs& a) { a.want |= kHist; }), "histogram");
  expect(refused([](GramArgs& a) { a.d = 0; }), "no elements");
  expect(refused([](GramArgs& a) { a.x.n = 0; }), "no vectors");
  expect(refused([](GramArgs& a) { a.x.stride_n = 65; }), "a stride of 130 bytes");
  expect(refused([](GramArgs& a) { a.x.stride_n = 0; }), "an expanded axis");
  expect(refused([](GramArgs& a) { a.x.stride_d = 2; }), "no contiguous axis");
  expect(refused([](GramArgs& a) { a.x.data = reinterpret_cast<const void*>((1 << 20) + 2); }), "an odd address");
  expect(refused([](GramArgs& a) { a.x.n = int64_t{1} << 23; }), "more tiles than 16 bits number");
  expect(refused([](GramArgs& a) { a.x.n = 100000, a.x.stride_b = 6400000, a.want |= kRowAbs; }), "slots beyond the budget");
  expect(!refused([](GramArgs& a) { a.x.n = 1, a.x.stride_n = 65, a.b = 1; }), "strides of single elements do not matter");
}

void check_scales() {
  for (int exponent = -148; exponent <= 128; ++exponent) {
    const double largest = std::ldexp(0.999, exponent);
    const int power = scale_exponent(exponent);
    const double scaled = std::ldexp(largest, power);
    expect(scaled < 32768 && (scaled >= 8192 || power == 126), "scaled into fp16's range");
    expect(std::fpclassify(std::ldexp(1.0f, -power)) == FP_NORMAL, "the inverse is a normal float");
  }
  expect(near_floor(1e-7 * 1000, 1000, 2048) && !near_floor(1e-3 * 1000, 1000, 2048), "what lies near the floor");
  const Best none{-1, -1, -1}, early{0.5f, 1, 2}, late{0.5f, 1, 3}, more{0.6f, 9, 10};
  expect(ranks_before(early, none) && ranks_before(early, late) && ranks_before(more, early) && !ranks_before(early, early),
         "larger first, then the earlier pair");
}

}  // namespace

int main() {
  check_lists();
  check_fragments(256);
  check_fragments(128);
  check_column_sums();
  for (const bool mn_major : {false, true}) {
    check_operands<LargeTile>(mn_major);
    check_operands<SmallTile>(mn_major);
  }
  check_barriers<LargeTile>();
  check_barriers<SmallTile>();
  check_plan();
  check_choice();
  check_refusals();
  check_scales();
  if (failures > 0) std::printf("%d checks failed\n", failures);
  if (failures == 0) std::printf("csrc_cuda_check: ok\n");
  return failures > 0;
}
