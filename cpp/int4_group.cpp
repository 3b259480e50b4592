#include "int4_group.h"

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace kvloom {

void pack_int4_group(const float* weight, int n, char* row, int column) {
  int8_t code[kInt4Group];
  float found[2];
  uint16_t half[2];
  kernels().int4_fit(weight, n, code, found);
  for (int i = 0; i < n; ++i) {
    char* at = row + (i / 8 * kPanelColumns + column) * 4;
    uint32_t word;
    std::memcpy(&word, at, 4);
    word |= (static_cast<uint32_t>(code[i]) & 15u) << int4_shift(i);
    std::memcpy(at, &word, 4);
  }
  kernels().from_float(Element::kHalf, found, half, 2);
  std::memcpy(row + kInt4CodeBytes + column * 2, &half[0], 2);
  std::memcpy(row + kInt4CodeBytes + (kPanelColumns + column) * 2, &half[1], 2);
}

void unpack_int4_group(const char* row, int column, int n, float* weight) {
  uint16_t half[2];
  float found[2];
  std::memcpy(&half[0], row + kInt4CodeBytes + column * 2, 2);
  std::memcpy(&half[1], row + kInt4CodeBytes + (kPanelColumns + column) * 2, 2);
  kernels().to_float(Element::kHalf, half, found, 2);
  for (int i = 0; i < n; ++i) {
    uint32_t word;
    std::memcpy(&word, row + (i / 8 * kPanelColumns + column) * 4, 4);
    const int code = static_cast<int32_t>(word << (28 - int4_shift(i))) >> 28;
    weight[i] = found[0] * static_cast<float>(code) + found[1];
  }
}

}  // namespace kvloom
