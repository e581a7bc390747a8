// One call on the host, before anything touches a device: which launches, which tables, how much memory.
//
// Plain C++: needs no CUDA, so that it is tested anywhere.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/gram_stats.h"
#include "cuda/tables.h"

namespace orthofast {
namespace cuda {

// What a tensor map says; the driver turns it into its 128 opaque bytes. Elements have 16 bits.
struct MapPlan {
  const void* address;
  uint64_t size[3];       // innermost first
  uint64_t stride[2];     // bytes of the second and third axis
  uint32_t box[3];
  bool bf16;
};

// Entries first .. last - 1 share a kernel.
struct Launch {
  int64_t first, last;
  bool large, bf16, mn_major;
};

struct Plan {
  std::vector<SideTable> sides;
  std::vector<RequestTable> requests;
  std::vector<MapPlan> maps;
  std::vector<Launch> launches;
  CallTables tables;         // addresses within the workspace
  int64_t table_bytes = 0;   // sides, requests, maps: what is uploaded
  int64_t bytes = 0;         // whole workspace
  int64_t most_vectors = 0;  // of one side, over its items
  int want = 0;              // of the kernels: kAbsSum, with moments and maximum, or everything
  bool rounds = false;       // some operand is rounded: a second, conditional round follows
  bool row_sums = false;
};

constexpr int64_t kMapBytes = 128;

// Lays out a call at `workspace`, 256-byte aligned; pass 0 to learn `bytes`. Requests are grouped by kernel, long
// vectors first. Throws std::invalid_argument with a sentence where a request cannot be served.
Plan make_plan(const GramArgs* requests, int64_t count, int processors, uintptr_t workspace);

// Why this request cannot be served, whatever the device; empty if it can.
std::string refusal(const GramArgs& request);

// The work list the device will write, for tests.
std::vector<WorkEntry> list_entries(const Plan& plan);

}  // namespace cuda
}  // namespace orthofast
