// One slot of a lane: its key and value, encoded as the sides of its store hold them.
#pragma once

#include <float.h>

#include "strip.h"

namespace KVLOOM_ISA {

// Symmetric int8: code = round(x * inverse), x ~ code * scale. The scale is the smallest normal number where a 127th of
// the peak would be less, so that codes are finite; a row of zeros has scale 0.
struct Int8Scale {
  float scale, inverse;
};
static inline Int8Scale int8_scale(float peak) {
  if (!(peak > 0)) return {0, 0};
  const float scale = peak / 127.0f;
  if (scale < FLT_MIN) return {FLT_MIN, 1.0f / FLT_MIN};
  return {scale, 127.0f / peak};
}

template <size_t Bytes> static inline void scatter(const char* from, char* to, size_t stride, int n) {
  for (int i = 0; i < n; ++i) memcpy(to + i * stride, from + i * Bytes, Bytes);
}

// Put x [width] where one slot of a side lies: units of `unit` elements side by side, `stride` bytes from each other.
static inline void write_side(const Side& side, const float* x, int width, int unit, size_t stride, char* at, float* scale) {
  char encoded[4096];
  if (side.element == Element::kInt8) {
    const Int8Scale by = int8_scale(row_peak(x, width));
    *scale = by.scale;
    for (int d = 0; d < width; ++d) encoded[d] = (char)(int8_t)__builtin_rintf(x[d] * by.inverse);
  } else {
    convert_from_float(side.element, x, encoded, width);
  }
  const size_t bytes = (size_t)unit * side.bytes;
  const int n = width / unit;
  if (stride == bytes) memcpy(at, encoded, n * bytes);
  else if (bytes == 4) scatter<4>(encoded, at, stride, n);
  else if (bytes == 2) scatter<2>(encoded, at, stride, n);
  else scatter<1>(encoded, at, stride, n);
}

// Encode the key and value of one slot in the store that its column has.
static void write_slot(const Lane& lane, int slot, const float* k, const float* v) {
  const BlockLayout layout = layout_of(lane, store_of(lane, slot));
  char* block = (char*)block_of(lane, slot);
  const int within = within_of(lane, slot);
  write_side(layout.k, k, lane.k_width, layout.k.per, layout.k_row(), block + layout.key(within),
             (float*)(block + layout.k_scale(within)));
  write_side(layout.v, v, lane.v_width, 1, layout.v_unit(), block + layout.value(within),
             (float*)(block + layout.v_scale(within)));
}

}  // namespace KVLOOM_ISA
