// What the fold needs of the CUDA driver, looked up when it is first needed: the module loads where there is none.
#pragma once

#include <string>

#include "cuda/plan.h"

namespace orthofast {
namespace cuda {

// A CUDA call that failed: one sentence, with the call and the runtime's own words.
struct Failure {
  std::string sentence;
};

// Writes the 128 bytes of a tensor map. Throws Failure.
void encode_map(const MapPlan& map, unsigned char* to);

}  // namespace cuda
}  // namespace orthofast
