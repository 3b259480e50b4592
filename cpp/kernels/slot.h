// One slot of a lane: its key and value, encoded as the sides of its store hold them.
#pragma once

#include "strip.h"

namespace KVLOOM_ISA {

// The codes of x [width], and their scale.
template <class Code> static inline float write_codes(const float* x, int width, char* codes) {
  const CodeScale by = code_scale<Code>(row_peak(x, width));
  for (int d = 0; d < width; ++d) codes[d] = (char)Code::code(x[d] * by.inverse);
  return by.scale;
}

template <size_t Bytes> static inline void scatter(const char* from, char* to, size_t stride, int n) {
  for (int i = 0; i < n; ++i) memcpy(to + i * stride, from + i * Bytes, Bytes);
}

// Put x [width] where one slot of a side lies: units of `unit` elements side by side, `stride` bytes from each other.
static inline void write_side(const Side& side, const float* x, int width, int unit, size_t stride, char* at, float* scale) {
  char encoded[4096];
  if (side.scaled) {
#define KVLOOM_WRITE(Code) *scale = write_codes<Code>(x, width, encoded)
    KVLOOM_BY_CODE(side.element, KVLOOM_WRITE)
#undef KVLOOM_WRITE
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
