// Memory for weights: huge pages where the system has them, many weights to a region, freed with the last of them.
#pragma once

#include <cstddef>
#include <memory>

namespace kvloom {

// Zeroed memory, aligned to 4096 bytes; the pointer keeps its region alive. Throws std::bad_alloc.
std::shared_ptr<char> allocate_weight(std::size_t bytes);

}  // namespace kvloom
