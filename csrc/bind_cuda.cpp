// Python module orthofast._cuda: unpack integers, release the interpreter lock, launch. Loading it touches no device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/gram_stats_cuda.h"
#include "cuda/plan.h"

namespace py = pybind11;
using namespace orthofast;

namespace {

constexpr size_t kFields = 25;  // int64 values of one request, in the order read below

Vectors read_vectors(const int64_t* field) {
  return Vectors{reinterpret_cast<const void*>(field[0]), field[1], field[2], field[3], field[4],
                 reinterpret_cast<double*>(field[5]), reinterpret_cast<double*>(field[6])};
}

GramArgs read_request(const int64_t* field) {
  GramArgs args{};
  args.x = read_vectors(field);
  args.y = read_vectors(field + 7);
  args.cross = field[14] != 0;
  args.normalize = field[15] != 0;
  args.dtype = static_cast<Dtype>(field[16]);
  args.precision = static_cast<Precision>(field[17]);
  args.want = static_cast<int32_t>(field[18]);
  args.bins = static_cast<int32_t>(field[19]);
  args.b = field[20];
  args.d = field[21];
  args.sums = reinterpret_cast<double*>(field[22]);
  args.counts = reinterpret_cast<int64_t*>(field[23]);
  args.hist = reinterpret_cast<int64_t*>(field[24]);
  return args;
}

std::vector<GramArgs> read_requests(const py::bytes& packed) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(packed.ptr(), &data, &size) != 0) throw py::error_already_set();
  const size_t bytes = kFields * sizeof(int64_t);
  if (static_cast<size_t>(size) % bytes != 0) throw py::value_error("packed requests need " + std::to_string(bytes) + " bytes each");
  std::vector<GramArgs> requests(static_cast<size_t>(size) / bytes);
  for (size_t r = 0; r < requests.size(); ++r) {
    int64_t field[kFields];
    std::memcpy(field, data + r * bytes, bytes);
    requests[r] = read_request(field);
  }
  return requests;
}

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
