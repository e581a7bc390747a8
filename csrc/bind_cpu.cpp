// Python module orthofast._cpu: unpack integers, release the interpreter lock, call the fold.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "bind_request.h"
#include "core/gram_stats.h"
#include "core/pair_gradient.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace orthofast;

namespace {

void gram_stats(const py::bytes& packed, int threads) {
  const std::vector<GramArgs> requests = read_requests(packed);
  py::gil_scoped_release release;
  gram_stats_cpu(requests.data(), static_cast<int64_t>(requests.size()), threads);
}

constexpr size_t kGradientFields = 14;  // int64 values, in the order read below

Units read_units(const int64_t* field) {
  return Units{reinterpret_cast<const void*>(field[0]), reinterpret_cast<void*>(field[1]),
               reinterpret_cast<const double*>(field[2]), field[3]};
}

void pair_gradient(const std::vector<int64_t>& field, double width, int threads) {
  if (field.size() != kGradientFields) throw py::value_error("a gradient needs " + std::to_string(kGradientFields) + " integers");
  GradientArgs args{};
  args.x = read_units(field.data());
  args.y = read_units(field.data() + 4);
  args.cross = field[8] != 0;
  args.wide = field[9] != 0;
  args.curve = static_cast<CurveKind>(field[10]);
  args.b = field[11];
  args.d = field[12];
  args.totals = reinterpret_cast<double*>(field[13]);
  args.width = width;
  py::gil_scoped_release release;
  pair_gradient_cpu(args, threads);
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const KernelTable* table : isa_levels()) names.emplace_back(table->name);
  return names;
}

double gflops(double (*spin)(int64_t)) {
  if (spin == nullptr) return 0.0;
  constexpr int64_t kSteps = 50000;  // well under a scheduler slice
  double best = 0;
  for (int trial = 0; trial < 200; ++trial) {
    const auto start = std::chrono::steady_clock::now();
    const double flop = spin(kSteps);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, flop / took.count() / 1e9);
  }
  return best;
}

py::dict fma_peak() {
  const KernelTable& table = kernels_in_force();
  double f32 = 0, bf16 = 0;
  {
    py::gil_scoped_release release;
    f32 = gflops(table.spin_f32);
    bf16 = gflops(table.spin_bf16);
  }
  py::dict peak;
  peak["float32"] = f32;
  if (bf16 > 0) peak["bfloat16"] = bf16;
  return peak;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU fold of orthofast; orthofast.kernels.native_cpu is its only caller.";
  m.attr("FIELDS") = kFields;
  m.def("gram_stats", &gram_stats, py::arg("packed"), py::arg("threads"));
  m.def("pair_gradient", &pair_gradient, py::arg("fields"), py::arg("width"), py::arg("threads"));
  m.def("isa", [] { return std::string(kernels_in_force().name); });
  m.def("isa_levels", &levels);
  m.def("force_isa", &force_isa, py::arg("name"));
  m.def("fma_peak", &fma_peak, "Multiply-add rate of one core from registers, in GFLOP/s, by operand dtype.");
}
