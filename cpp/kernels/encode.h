// Whole blocks from a native store into another, a side at a time. A side is made of rows of B of tile.h: keys have a row
// for each element and a column for each slot, values a row for each slot and a column for each element:
//
//   native   rows of `per` x columns    ->   float [rows][columns]   ->   codes in rows of 4 x columns, a word a column
//
// so that a code is made where it lies, whatever the side; only what the scales run along differs.
#pragma once

#include "slot.h"

namespace KVLOOM_ISA {

// Rows [rows, columns] of a native side that begin `stride` bytes from each other, as floats.
static inline void rows_to_float(const Side& side, const char* from, size_t stride, int rows, int columns, float* out) {
  if (side.per != 2) {
    for (int r = 0; r < rows; ++r) convert_to_float(side.element, from + r * stride, out + (size_t)r * columns, columns);
    return;
  }
  for (int r = 0; r < rows; r += 2, from += stride, out += 2 * columns) {  // pairs of bf16
    int c = 0;
    for (; c + W <= columns; c += W) {
      const vi pair = vloadi(from + c * 4);
      vstore(out + c, vlow(pair));
      vstore(out + columns + c, vhigh(pair));
    }
    for (; c < columns; ++c) convert_to_float(side.element, from + c * 4, out + c, 1), convert_to_float(side.element, from + c * 4 + 2, out + columns + c, 1);
  }
}

// Four rows of floats, each column by its own `inverse` (or each row by its own), as words of four codes.
template <class Code, bool ByColumn>
static inline void quads(const float* x, int columns, const float* inverse, char* out) {
  for (int c = 0; c < columns; ++c) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const float by = ByColumn ? inverse[c] : inverse[i];
      word |= Code::code(x[i * columns + c] * by) << 8 * i;
    }
    memcpy(out + c * 4, &word, 4);
  }
}

// Sixteen slots of keys: x [width, 16].
template <class Code>
static inline void encode_keys(const float* x, int width, char* to, size_t stride, float* scale) {
  float peak[kGroup], inverse[kGroup];
  for (int c = 0; c < kGroup; c += W) {
    vf top = vzero();
    for (int d = 0; d < width; ++d) top = vmax(top, vabs(vload(x + d * kGroup + c)));
    vstore(peak + c, top);
  }
  for (int c = 0; c < kGroup; ++c) {
    const CodeScale by = code_scale<Code>(peak[c]);
    scale[c] = by.scale;
    inverse[c] = by.inverse;
  }
  for (int d = 0; d < width; d += 4) quads<Code, true>(x + d * kGroup, kGroup, inverse, to + d / 4 * stride);
}

// Sixteen slots of values: x [16, width].
template <class Code>
static inline void encode_values(const float* x, int width, char* to, size_t stride, float* scale) {
  float inverse[kGroup];
  for (int p = 0; p < kGroup; ++p) {
    const CodeScale by = code_scale<Code>(row_peak(x + (size_t)p * width, width));
    scale[p] = by.scale;
    inverse[p] = by.inverse;
  }
  for (int p = 0; p < kGroup; p += 4) quads<Code, false>(x + (size_t)p * width, width, inverse + p, to + p / 4 * stride);
}

// A side that both stores hold alike is copied, the others are encoded.
static void encode_block(const EncodeArgs& args, char* scratch) {
  const BlockLayout from = {args.from_store, args.block_size, args.k_width, args.v_width};
  const BlockLayout to = {args.to_store, args.block_size, args.k_width, args.v_width};
  const bool keys = args.k_width && from.k.element != to.k.element, values = args.v_width && from.v.element != to.v.element;
  float* x = (float*)scratch;
  if (!keys) memcpy(args.to, args.from, from.k_bytes());
  if (!values) memcpy(args.to + to.value(0), args.from + from.value(0), from.v_bytes());
  for (int slot = 0; slot < args.block_size; slot += kGroup) {
    if (keys) {
      rows_to_float(from.k, args.from + from.key(slot), from.k_row(), args.k_width, kGroup, x);
#define KVLOOM_KEYS(Code) \
  encode_keys<Code>(x, args.k_width, args.to + to.key(slot), to.k_row(), (float*)(args.to + to.k_scale(slot)))
      KVLOOM_BY_CODE(to.k.element, KVLOOM_KEYS)
#undef KVLOOM_KEYS
    }
    if (values) {
      rows_to_float(from.v, args.from + from.value(slot), from.v_row(), kGroup, args.v_width, x);
#define KVLOOM_VALUES(Code) \
  encode_values<Code>(x, args.v_width, args.to + to.value(slot), to.v_row(), (float*)(args.to + to.v_scale(slot)))
      KVLOOM_BY_CODE(to.v.element, KVLOOM_VALUES)
#undef KVLOOM_VALUES
    }
  }
}

}  // namespace KVLOOM_ISA
