// A request as the Python side packs it: 25 int64 values, read the same way by both native modules.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "core/gram_stats.h"

namespace orthofast {
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

std::vector<GramArgs> read_requests(const pybind11::bytes& packed) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(packed.ptr(), &data, &size) != 0) throw pybind11::error_already_set();
  const size_t bytes = kFields * sizeof(int64_t);
  if (static_cast<size_t>(size) % bytes != 0) throw pybind11::value_error("packed requests need " + std::to_string(bytes) + " bytes each");
  std::vector<GramArgs> requests(static_cast<size_t>(size) / bytes);
  for (size_t r = 0; r < requests.size(); ++r) {
    int64_t field[kFields];
    std::memcpy(field, data + r * bytes, bytes);
    requests[r] = read_request(field);
  }
  return requests;
}

}  // namespace
}  // namespace orthofast
