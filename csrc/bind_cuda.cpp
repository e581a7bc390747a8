// Python module orthofast._cuda: unpack integers, release the interpreter lock, launch. Loading it touches no device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_request.h"
#include "cuda/gram_stats_cuda.h"
#include "cuda/plan.h"

namespace py = pybind11;
using namespace orthofast;

namespace {

std::string refusal(const py::bytes& packed) {
  for (const GramArgs& request : read_requests(packed)) {
    std::string sentence = cuda::refusal(request);
    if (!sentence.empty()) return sentence;
  }
  return "";
}

int64_t workspace_bytes(const py::bytes& packed, int processors) {
  const std::vector<GramArgs> requests = read_requests(packed);
  return cuda_workspace_bytes(requests.data(), static_cast<int64_t>(requests.size()), processors);
}

void gram_stats(const py::bytes& packed, uintptr_t workspace, int64_t bytes, int processors, int device, uintptr_t stream) {
  const std::vector<GramArgs> requests = read_requests(packed);
  std::string failure;
  {
    py::gil_scoped_release release;
    try {
      gram_stats_cuda(requests.data(), static_cast<int64_t>(requests.size()), workspace, bytes, processors, device, stream);
    } catch (const cuda::Failure& caught) {
      failure = caught.sentence;
    }
  }
  if (!failure.empty()) throw std::runtime_error(failure);
}

std::vector<std::pair<int32_t, int32_t>> work_list(const py::bytes& packed, int processors) {
  const std::vector<GramArgs> requests = read_requests(packed);
  std::vector<std::pair<int32_t, int32_t>> list;
  const cuda::Plan plan = cuda::make_plan(requests.data(), static_cast<int64_t>(requests.size()), processors, 0);
  for (const WorkEntry& entry : cuda::list_entries(plan)) list.emplace_back(entry.problem, entry.tiles);
  return list;
}

// (first entry, end, edge of a tile, bfloat16, vectors contiguous) of each launch of the fold
std::vector<std::tuple<int64_t, int64_t, int, bool, bool>> launches(const py::bytes& packed, int processors) {
  const std::vector<GramArgs> requests = read_requests(packed);
  std::vector<std::tuple<int64_t, int64_t, int, bool, bool>> made;
  const cuda::Plan plan = cuda::make_plan(requests.data(), static_cast<int64_t>(requests.size()), processors, 0);
  for (const cuda::Launch& launch : plan.launches) {
    made.emplace_back(launch.first, launch.last, launch.large ? 256 : 128, launch.bf16, launch.mn_major);
  }
  return made;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Hopper fold of orthofast; orthofast.kernels.native_cuda is its only caller.";
  m.attr("FIELDS") = kFields;
  m.def("lack", &cuda_lack, py::arg("device"), "Why the device cannot run the fold; empty if it can.");
  m.def("refusal", &refusal, py::arg("packed"), "Why requests cannot be served on any device; empty if they can.");
  m.def("workspace_bytes", &workspace_bytes, py::arg("packed"), py::arg("processors"));
  m.def("gram_stats", &gram_stats, py::arg("packed"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("processors"),
        py::arg("device"), py::arg("stream"));
  m.def("work_list", &work_list, py::arg("packed"), py::arg("processors"), "Entries the device will write, for tests.");
  m.def("launches", &launches, py::arg("packed"), py::arg("processors"), "Ranges of entries that share a kernel, for tests.");
}
