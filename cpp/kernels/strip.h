// A strip of slots of one lane: the addresses of its bytes, and the scaling and masking of its scores.
//
//   slots   | freed |begin ...            context              ... lane_end| unwritten
//   strips          [   64   ][   64   ][   64   ][   64   ][  rest ]
//   one row           first ................................... last
//
// Keys lie as [k_width / per][P][per], values as [P / per][v_width][per]: both are the B operand of tile.h, for
// decode (rows = query heads of the group) and for prefill (rows = queries x heads) alike.
#pragma once

#include "kernels.h"
#include "linear.h"
#include "tile.h"

namespace KVLOOM_ISA {

using namespace kvloom;

constexpr float kLog2E = 1.44269504089f;
constexpr int kGroup = 16;   // slots per column group
constexpr float kMinusInf = -__builtin_inff();

static inline int column_of(const Lane& lane, int slot) { return divide_by_block(slot, lane.block_inverse); }
static inline int within_of(const Lane& lane, int slot) { return slot - column_of(lane, slot) * lane.block_size; }
static inline const char* block_of(const Lane& lane, int slot) {
  return lane.arena + (size_t)(uint32_t)lane.columns[column_of(lane, slot)] * 128;
}
static inline Store store_of(const Lane& lane, int slot) {
  if (lane.num_segments == 0) return lane.store;
  int column = column_of(lane, slot);
  for (int i = 0; i < lane.num_segments; ++i)
    if (column < lane.segment_end[i]) return (Store)lane.segment_store[i];
  return lane.store;
}
static inline BlockLayout layout_of(const Lane& lane, Store store) {
  return {store, lane.block_size, lane.k_width, lane.v_width};
}
static inline const char* key_group(const Lane& lane, Store store, int slot) {
  return block_of(lane, slot) + layout_of(lane, store).key(within_of(lane, slot));
}
static inline const char* value_group(const Lane& lane, Store store, int slot) {
  return block_of(lane, slot) + layout_of(lane, store).value(within_of(lane, slot));
}
static inline const float* key_scales(const Lane& lane, Store store, int slot) {
  return (const float*)(block_of(lane, slot) + layout_of(lane, store).k_scale(within_of(lane, slot)));
}
static inline const float* value_scales(const Lane& lane, Store store, int slot) {
  return (const float*)(block_of(lane, slot) + layout_of(lane, store).v_scale(within_of(lane, slot)));
}

struct Strip {
  int begin, end;  // slots, multiples of 16 (the end may pass slot_end)
  Store store;
};

static inline Strip next_strip(const AttendArgs& args, int begin, int most) {
  Strip strip = {begin, begin, store_of(args.lane, begin)};
  while (strip.end < args.slot_end && strip.end - begin < most && store_of(args.lane, strip.end) == strip.store)
    strip.end += kGroup;
  return strip;
}

// A copy of the value group at `slot` with zeros where the lane is not yet written: such slots may hold anything, NaN
// included, and 0 x NaN is not 0.
template <class Kind>
static inline const char* without_unwritten(const AttendArgs& args, const char* group, int slot, char* copy) {
  constexpr int unit = Kind::kPer * Kind::kBBytes, rows = kGroup / Kind::kPer;
  const int width = args.lane.v_width, written = args.lane_end > slot ? args.lane_end - slot : 0;
  const int whole = written / Kind::kPer, rest = written % Kind::kPer;
  memcpy(copy, group, (size_t)whole * width * unit);
  memset(copy + (size_t)whole * width * unit, 0, (size_t)(rows - whole) * width * unit);
  if (rest) {
    const uint32_t keep = (1u << rest * Kind::kBBytes * 8) - 1;
    for (int d = 0; d < width; ++d) {
      uint32_t value = 0;
      const size_t at = ((size_t)whole * width + d) * unit;
      memcpy(&value, group + at, unit);
      value &= keep;
      memcpy(copy + at, &value, unit);
    }
  }
  return copy;
}

// Convert the raw scores of one row to units of log 2, and set them to -inf where the row does not attend.
static inline void finish_scores(const AttendArgs& args, const Strip& strip, int row, float* s) {
  const int n = strip.end - strip.begin;
  if (k_side(strip.store).scaled)
    for (int j = 0; j < n; j += kGroup) {
      const float* scale = key_scales(args.lane, strip.store, strip.begin + j);
      for (int i = 0; i < kGroup; i += W) vstore(s + j + i, vmul(vload(s + j + i), vload(scale + i)));
    }
  if (args.softcap > 0) {
    vf inverse = vset(1.0f / args.softcap), cap = vset(args.softcap * kLog2E);
    for (int j = 0; j < n; j += W) vstore(s + j, vmul(vtanh(vmul(vload(s + j), inverse)), cap));
  }
  if (args.slope) {
    float slope = args.slope[row] * kLog2E;
    if (args.slot_position) {
      const int32_t* token = args.slot_position + strip.begin;
      const int held = args.lane_end - strip.begin < n ? args.lane_end - strip.begin : n;
      for (int j = 0; j < held; ++j) s[j] += slope * (float)(token[j] - args.position[row]);
    } else {
      int distance = strip.begin - args.position[row];
      for (int j = 0; j < n; ++j) s[j] += slope * (float)(distance + j);
    }
  }
  int low = args.first[row] > args.slot_begin ? args.first[row] : args.slot_begin;
  int high = args.last[row] < args.slot_end ? args.last[row] : args.slot_end;
  low -= strip.begin;
  high -= strip.begin;
  if (args.bias)
    for (int j = low > 0 ? low : 0; j < (high < n ? high : n); ++j) s[j] += args.bias[strip.begin + j] * kLog2E;
  for (int j = 0; j < (low < n ? low : n); ++j) s[j] = kMinusInf;
  for (int j = high > 0 ? high : 0; j < n; ++j) s[j] = kMinusInf;
}

static inline void write_probability(Element compute, char* row, int j, vf p) {
  if (compute == Element::kBf16)
    vstore_bf16((uint16_t*)row + j, p);
  else
    vstore((float*)row + j, p);
}

static inline void scale_row(float* x, int n, float by) {
  vf factor = vset(by);
  for (int d = 0; d < n; d += W) vstore(x + d, vmul(vload(x + d), factor));
}

// call(K, V) with the kinds of product that keys and values of a store take part in; both have the same A.
#define KVLOOM_BY_STORE(store, compute, call)                                                                    \
  switch (store) {                                                                                               \
    case Store::kFloat: call(WeightF32, WeightF32); break;                                                       \
    case Store::kHalf: call(HalfByF32, HalfByF32); break;                                                        \
    case Store::kBf16:                                                                                           \
      if (compute == Element::kBf16) { call(WeightBf16, WeightBf16); } else { call(Bf16ByF32, Bf16ByF32); }      \
      break;                                                                                                     \
    case Store::kInt8:                                                                                           \
      if (compute == Element::kBf16) { call(Int8ByBf16, Int8ByBf16); } else { call(Int8ByF32, Int8ByF32); }      \
      break;                                                                                                     \
    case Store::kE4m3:                                                                                           \
      if (compute == Element::kBf16) { call(E4m3ByBf16, E4m3ByBf16); } else { call(E4m3ByF32, E4m3ByF32); }      \
      break;                                                                                                     \
  }

}  // namespace KVLOOM_ISA
