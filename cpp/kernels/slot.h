// One slot of a lane: its key and value, encoded as its store holds them.
#pragma once

#include "strip.h"

namespace KVLOOM_ISA {

// Encode the key and value of one slot in the store that its column has.
static void write_slot(const Lane& lane, int slot, const float* k, const float* v) {
  Element store = store_of(lane, slot);
  char* block = (char*)block_of(lane, slot);
  const int within = within_of(lane, slot), P = lane.block_size;
  if (store == Element::kInt8) {
    float* scale = (float*)scale_group(lane, false, slot);
    for (int side = 0; side < 2; ++side) {
      const float* x = side ? v : k;
      int width = side ? lane.v_width : lane.k_width;
      if (width == 0) continue;
      float peak = row_peak(x, width), inverse = peak > 0 ? 127.0f / peak : 0.0f;
      scale[side ? P : 0] = peak / 127.0f;
      int8_t* code = (int8_t*)block + (side ? (size_t)P * lane.k_width : 0);
      for (int d = 0; d < width; ++d) {
        size_t at = side ? ((size_t)(within / 4) * width + d) * 4 + within % 4 : ((size_t)(d / 4) * P + within) * 4 + d % 4;
        code[at] = (int8_t)__builtin_rintf(x[d] * inverse);
      }
    }
    return;
  }
  if (store == Element::kFloat) {
    float* base = (float*)block;
    for (int d = 0; d < lane.k_width; ++d) base[(size_t)d * P + within] = k[d];
    memcpy(base + (size_t)P * lane.k_width + (size_t)within * lane.v_width, v, lane.v_width * 4);
    return;
  }
  uint16_t* base = (uint16_t*)block;
  uint16_t* values = base + (size_t)P * lane.k_width;
  uint16_t rounded[1024];
  convert_from_float(store, k, rounded, lane.k_width);
  if (store == Element::kHalf) {
    for (int d = 0; d < lane.k_width; ++d) base[(size_t)d * P + within] = rounded[d];
    convert_from_float(store, v, values + (size_t)within * lane.v_width, lane.v_width);
    return;
  }
  for (int d = 0; d < lane.k_width; d += 2) memcpy(base + ((size_t)(d / 2) * P + within) * 2, rounded + d, 4);
  convert_from_float(store, v, rounded, lane.v_width);
  uint16_t* pair = values + (size_t)(within / 2) * lane.v_width * 2 + within % 2;
  for (int d = 0; d < lane.v_width; ++d) pair[2 * d] = rounded[d];
}

}  // namespace KVLOOM_ISA
