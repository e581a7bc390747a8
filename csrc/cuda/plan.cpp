// Lays out a call: operands, kernels, tables, workspace.
#include "cuda/plan.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/layout.h"

namespace orthofast {
namespace cuda {
namespace {

constexpr double kSmallRate = 0.8;  // of a 128 x 128 tile's products per second to a 256 x 256 tile's on two processors
constexpr int64_t kOneSmallTile = 128;
constexpr int64_t kMostSlotBytes = int64_t{64} << 20;
constexpr int64_t kMostVectors = int64_t{1} << 30;  // coordinates and indices are int32

int64_t element_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return 4;
    case Dtype::f16:
    case Dtype::bf16: return 2;
    case Dtype::e4m3fn:
    case Dtype::e5m2: return 1;
    default: return 0;
  }
}

bool aligned(const Vectors& side, int64_t inner_stride, int64_t outer, int64_t outer_size, int64_t b, int64_t bytes) {
  const auto fits = [&](int64_t stride, int64_t size) { return size <= 1 || (stride > 0 && stride * bytes % 16 == 0); };
  return inner_stride == 1 && reinterpret_cast<uintptr_t>(side.data) % 16 == 0 && fits(outer, outer_size) && fits(side.stride_b, b);
}

bool rows_aligned(const Vectors& side, const GramArgs& request) {
  return aligned(side, request.d == 1 ? 1 : side.stride_d, side.stride_n, side.n, request.b, element_bytes(request.dtype));
}

bool columns_aligned(const Vectors& side, const GramArgs& request) {
  return aligned(side, side.n == 1 ? 1 : side.stride_n, side.stride_d, request.d, request.b, element_bytes(request.dtype));
}

template <typename Test>
bool both_sides(const GramArgs& request, Test test) {
  return test(request.x, request) && (!request.cross || test(request.y, request));
}

bool is_16_bit(Dtype dtype) { return dtype == Dtype::f16 || dtype == Dtype::bf16; }

bool can_read(const GramArgs& request) {
  return !is_16_bit(request.dtype) || both_sides(request, rows_aligned) || both_sides(request, columns_aligned);
}

struct Operands {
  Operand kind;
  bool mn_major;
};

Operands operands_of(const GramArgs& request) {
  const bool exact = is_16_bit(request.dtype), rows = both_sides(request, rows_aligned);
  // fp8 elements are exact in fp16 up to 2^-39 of the largest: one product, no floor
  Operand kind = exact ? Operand::exact : Operand::converted;
  if (request.dtype == Dtype::f32) kind = request.precision == Precision::highest ? Operand::split : Operand::rounded;
  return Operands{kind, !rows && both_sides(request, columns_aligned)};
}

// fp16 copies of an operand: a rounded one keeps room for its low part.
int64_t copies(Operand kind) { return kind == Operand::exact ? 0 : kind == Operand::converted ? 1 : 2; }

struct Sized {
  int64_t at = 0;
  uintptr_t base;

  template <typename T>
  T* take(int64_t count) {
    at = (at + 255) / 256 * 256;
    T* where = reinterpret_cast<T*>(base + static_cast<uintptr_t>(at));
    at += count * static_cast<int64_t>(sizeof(T));
    return where;
  }
};

SideTable side_of(const Vectors& vectors, const GramArgs& request, const Operands& operands) {
  SideTable side{};
  side.data = vectors.data;
  side.n = vectors.n;
  side.padded = block_count(vectors.n, kPad) * kPad;
  side.stride_b = vectors.stride_b;
  side.stride_n = vectors.stride_n;
  side.stride_d = vectors.stride_d;
  side.d = request.d;
  side.b = request.b;
  side.norm_sq = vectors.norm_sq;
  side.row_abs = (request.want & kRowAbs) ? vectors.row_abs : nullptr;
  side.dtype = request.dtype;
  side.kind = operands.kind;
  side.mn_major = operands.mn_major;
  side.wide = operands.mn_major ? columns_aligned(vectors, request) : rows_aligned(vectors, request);
  side.normalize = request.normalize;
  if (operands.kind != Operand::exact) side.pitch = block_count(operands.mn_major ? side.n : side.d, 8) * 8;
  return side;
}

// A stride the driver accepts where the axis has one element.
uint64_t stride_bytes(int64_t stride, int64_t size, int64_t inner) {
  return static_cast<uint64_t>(size > 1 ? stride * 2 : block_count(inner, 8) * 16);
}

MapPlan map_of(const SideTable& side) {
  MapPlan map{};
  const int64_t inner = side.mn_major ? side.n : side.d, outer = side.mn_major ? side.d : side.n;
  const bool exact = side.kind == Operand::exact;
  const int64_t items = exact ? side.b : copies(side.kind) * side.b;
  const int64_t outer_stride = exact ? (side.mn_major ? side.stride_d : side.stride_n) : side.pitch;
  map.address = exact ? side.data : side.operand;
  map.size[0] = static_cast<uint64_t>(inner);
  map.size[1] = static_cast<uint64_t>(outer);
  map.size[2] = static_cast<uint64_t>(items);
  map.stride[0] = stride_bytes(outer_stride, outer, inner);
  map.stride[1] = stride_bytes(exact ? side.stride_b : outer * side.pitch, items, inner);
  map.box[0] = side.mn_major ? kChunkVectors : kStepK;
  map.box[1] = side.mn_major ? kStepK : kBoxVectors;
  map.box[2] = 1;
  map.bf16 = exact && side.dtype == Dtype::bf16;
  return map;
}

// Per-vector partial sums of one request, in bytes: a slot per vector and tile column, and per vector and tile row.
int64_t slot_bytes(const GramArgs& request) {
  const int64_t n = request.x.n, m = request.cross ? request.y.n : n;
  return 4 * request.b * (block_count(m, LargeTile::kEdge) * n + block_count(n, kBoxVectors) * m);
}

int64_t entries_of(const GramArgs& request, int64_t edge) {
  const bool within = !request.cross;
  const int64_t m = within ? request.x.n : request.y.n;
  return request.b * band_entries(row_tiles(request.x.n, edge, within), block_count(m, edge), within);
}

// Whole waves on all processors, in units of one processor's work on a 128 x 256 tile.
bool prefers_large(const std::vector<const GramArgs*>& group, int processors) {
  int64_t large = 0, small = 0, widest = 0;
  for (const GramArgs* request : group) {
    large += entries_of(*request, LargeTile::kEdge);
    small += entries_of(*request, SmallTile::kEdge);
    widest = std::max({widest, request->x.n, request->cross ? request->y.n : 0});
  }
  if (widest <= kOneSmallTile) return false;
  const double large_waves = static_cast<double>(block_count(large, std::max(1, processors / 2)));
  const double small_waves = 0.5 * static_cast<double>(block_count(small, processors));
  return large_waves <= small_waves / kSmallRate;
}

RequestTable request_of(const GramArgs& request, const Operands& operands, bool large) {
  RequestTable row{};
  const int64_t edge = large ? LargeTile::kEdge : SmallTile::kEdge;
  row.b = request.b;
  row.d = request.d;
  row.within = !request.cross;
  row.row_tiles = row_tiles(request.x.n, edge, !request.cross);
  row.col_tiles = block_count(request.cross ? request.y.n : request.x.n, edge);
  row.entries = band_entries(row.row_tiles, row.col_tiles, !request.cross);
  row.cluster = large ? LargeTile::kCluster : SmallTile::kCluster;
  row.parts = operands.kind == Operand::split ? 3 : 1;
  row.want = request.want;
  row.sums = request.sums;
  row.counts = request.counts;
  return row;
}

using Key = std::tuple<bool, bool, bool>;  // bf16, MN-major, fits one small tile

}  // namespace

std::string refusal(const GramArgs& request) {
  const int64_t m = request.cross ? request.y.n : request.x.n;
  if (request.b < 1 || request.d < 1 || request.x.n < 1 || m < 1) {
    return "it needs at least one item, one vector and one element";
  }
  if (request.precision == Precision::float64) return "it has no float64 arithmetic";
  if (element_bytes(request.dtype) == 0) return "it takes float32, float16, bfloat16, float8_e4m3fn and float8_e5m2";
  if (request.want & kHist) return "it has no histogram";
  if (std::max({request.x.n, m, request.d, request.b}) > kMostVectors ||
      block_count(std::max(request.x.n, m), kBoxVectors) >= kTileLimit) {
    return "it numbers at most 4194176 vectors of one set; split the set";
  }
  if ((request.want & kRowAbs) && slot_bytes(request) > kMostSlotBytes) {
    return "its partial sums per vector would take " + std::to_string(slot_bytes(request) >> 20) + " MiB, the most is " +
           std::to_string(kMostSlotBytes >> 20) + "; leave out row_abs or split the set";
  }
  if (!can_read(request)) {
    return "it reads 16-bit vectors in place: one axis contiguous, the address and the other strides multiples of 16 bytes, "
           "both sides alike; a contiguous copy would do";
  }
  return "";
}

Plan make_plan(const GramArgs* requests, int64_t count, int processors, uintptr_t workspace) {
  Plan plan;
  std::vector<Operands> operands;
  std::map<Key, std::vector<int64_t>> groups;
  int want = 0;
  for (int64_t r = 0; r < count; ++r) {
    const GramArgs& request = requests[r];
    const std::string sentence = refusal(request);
    if (!sentence.empty()) throw std::invalid_argument("the Hopper fold cannot serve a request: " + sentence);
    operands.push_back(operands_of(request));
    const Operands& chosen = operands.back();
    const int64_t widest = std::max(request.x.n, request.cross ? request.y.n : 0);
    const bool bf16 = request.dtype == Dtype::bf16;
    groups[Key{bf16, chosen.mn_major, widest <= kOneSmallTile}].push_back(r);
    want |= request.want;
    plan.rounds |= chosen.kind == Operand::rounded && request.normalize;
  }
  plan.row_sums = (want & kRowAbs) != 0;
  plan.want = plan.row_sums ? kAbsSum | kSqSum | kSum | kAbsMax | kRowAbs
              : (want & (kSqSum | kSum | kAbsMax)) ? kAbsSum | kSqSum | kSum | kAbsMax
                                                   : kAbsSum;

  int64_t problems = 0, entries = 0, vector_groups = 0;
  for (auto& [key, members] : groups) {
    std::stable_sort(members.begin(), members.end(), [&](int64_t a, int64_t b) { return requests[a].d > requests[b].d; });
    std::vector<const GramArgs*> group;
    for (int64_t r : members) group.push_back(requests + r);
    const bool large = prefers_large(group, processors);
    const int64_t first = entries;
    for (int64_t r : members) {
      const GramArgs& request = requests[r];
      RequestTable row = request_of(request, operands[static_cast<size_t>(r)], large);
      row.first_problem = problems;
      row.first_entry = entries;
      row.side_x = static_cast<int32_t>(plan.sides.size());
      plan.sides.push_back(side_of(request.x, request, operands[static_cast<size_t>(r)]));
      if (request.cross) plan.sides.push_back(side_of(request.y, request, operands[static_cast<size_t>(r)]));
      row.side_y = static_cast<int32_t>(plan.sides.size()) - 1;
      for (int32_t s = row.side_x; s <= row.side_y; ++s) {
        SideTable& side = plan.sides[static_cast<size_t>(s)];
        side.first_problem = problems;
        side.first_group = vector_groups;
        side.map = s;
        vector_groups += side.b * (side.padded / group_vectors(side));
        plan.most_vectors = std::max(plan.most_vectors, side.b * side.n);
      }
      problems += row.b;
      entries += row.b * row.entries;
      plan.requests.push_back(row);
    }
    if (entries > first) plan.launches.push_back(Launch{first, entries, large, std::get<0>(key), std::get<1>(key)});
  }

  Sized at{0, workspace};
  CallTables& tables = plan.tables;
  tables = CallTables{};
  tables.sides = at.take<SideTable>(static_cast<int64_t>(plan.sides.size()));
  tables.requests = at.take<RequestTable>(count);
  tables.maps = at.take<unsigned char>(kMapBytes * static_cast<int64_t>(plan.sides.size()));
  plan.table_bytes = at.at;
  tables.problems = at.take<Problem>(problems);
  tables.entries = at.take<WorkEntry>(entries);
  tables.redo = at.take<int32_t>(problems);
  tables.abs_sum = at.take<float>(entries * kSlots);
  if (plan.want != kAbsSum) {
    tables.sq_sum = at.take<float>(entries * kSlots);
    tables.sum = at.take<float>(entries * kSlots);
    tables.best = at.take<Best>(entries * kSlots);
  }
  for (SideTable& side : plan.sides) {
    side.inverse = at.take<float>(side.b * side.padded);
    const int64_t rows = side.mn_major ? side.d : side.n;
    if (side.kind != Operand::exact) side.operand = at.take<uint16_t>(copies(side.kind) * side.b * rows * side.pitch);
    plan.maps.push_back(map_of(side));
  }
  for (RequestTable& row : plan.requests) {
    if (!plan.row_sums) break;
    const SideTable &x = plan.sides[static_cast<size_t>(row.side_x)], &y = plan.sides[static_cast<size_t>(row.side_y)];
    row.row_slots = at.take<float>(row.b * row.col_tiles * x.padded);
    row.col_slots = at.take<float>(row.b * row.row_tiles * row.cluster * y.padded);
  }
  tables.side_count = static_cast<int64_t>(plan.sides.size());
  tables.request_count = count;
  tables.problem_count = problems;
  tables.entry_count = entries;
  tables.group_count = vector_groups;
  plan.bytes = at.at;
  return plan;
}

std::vector<WorkEntry> list_entries(const Plan& plan) {
  std::vector<WorkEntry> list;
  for (const RequestTable& row : plan.requests) {
    for (int64_t item = 0; item < row.b; ++item) {
      for (int64_t e = 0; e < row.entries; ++e) {
        list.push_back(pack_entry(row.first_problem + item, band_pair(e, row.row_tiles, row.col_tiles, row.within != 0)));
      }
    }
  }
  return list;
}

}  // namespace cuda
}  // namespace orthofast
