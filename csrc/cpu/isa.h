// Which instruction sets this build and this processor share, and which one is in force.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace orthofast {

const std::vector<const KernelTable*>& isa_levels();  // narrowest first
const KernelTable& kernels_in_force();
bool force_isa(const std::string& name);  // false: unknown here

}  // namespace orthofast
