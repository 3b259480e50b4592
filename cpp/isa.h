// Which table of kernels this process uses.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace kvloom {

const Kernels& kernels();
// Names of the tables that this processor can run, best first.
std::vector<std::string> available_isas();
// Use `name` from now on; false if this processor or build has no such table.
bool force_isa(const std::string& name);

}  // namespace kvloom
