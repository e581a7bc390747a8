// The Hopper fold from the host: one call, all launches on one stream, nothing waits.
#pragma once

#include <cstdint>
#include <string>

#include "core/gram_stats.h"
#include "cuda/driver.h"

namespace orthofast {

// Why this machine or device cannot run the fold; empty if it can. Starts no context on the device.
std::string cuda_lack(int device);

// Bytes of device memory a call needs beside its outputs. Throws std::invalid_argument with a sentence.
int64_t cuda_workspace_bytes(const GramArgs* requests, int64_t count, int processors);

// Folds `count` requests on `device` in the order of `stream`; every address is of that device. The same bits for any
// number of processors of the same tile choice and from run to run.
// Throws std::invalid_argument before the first launch, cuda::Failure where CUDA reports an error.
void gram_stats_cuda(const GramArgs* requests, int64_t count, uintptr_t workspace, int64_t workspace_bytes, int processors,
                     int device, uintptr_t stream);

}  // namespace orthofast
