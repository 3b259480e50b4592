// Attention of a few query rows over a part of one lane, online over strips of slots; and the key mass that
// a log-sum-exp makes of the same scores.
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
constexpr int kStrip = 128;  // most slots per strip
constexpr int kFewRows = 6;
constexpr float kMinusInf = -__builtin_inff();

static inline int store_per(Element e) { return e == Element::kBf16 ? 2 : e == Element::kInt8 ? 4 : 1; }
static inline int store_bytes(Element e) { return e == Element::kFloat ? 4 : e == Element::kInt8 ? 1 : 2; }

static inline int column_of(const Lane& lane, int slot) { return divide_by_block(slot, lane.block_inverse); }
static inline int within_of(const Lane& lane, int slot) { return slot - column_of(lane, slot) * lane.block_size; }
static inline const char* block_of(const Lane& lane, int slot) {
  return lane.arena + (size_t)(uint32_t)lane.columns[column_of(lane, slot)] * 128;
}
static inline Element store_of(const Lane& lane, int slot) {
  if (lane.num_segments == 0) return lane.store;
  int column = column_of(lane, slot);
  for (int i = 0; i < lane.num_segments; ++i)
    if (column < lane.segment_end[i]) return (Element)lane.segment_store[i];
  return lane.store;
}
static inline const char* key_group(const Lane& lane, Element store, int slot) {
  return block_of(lane, slot) + (size_t)within_of(lane, slot) * store_per(store) * store_bytes(store);
}
static inline const char* value_group(const Lane& lane, Element store, int slot) {
  int within = within_of(lane, slot);
  return block_of(lane, slot) + ((size_t)lane.block_size * lane.k_width + (size_t)within * lane.v_width) * store_bytes(store);
}
// Scales of the int8 store behind the codes: K [P], then V [P].
static inline const float* scale_group(const Lane& lane, bool value, int slot) {
  size_t codes = (size_t)lane.block_size * (lane.k_width + lane.v_width);
  return (const float*)(block_of(lane, slot) + codes) + (value ? lane.block_size : 0) + within_of(lane, slot);
}

struct Strip {
  int begin, end;  // slots, multiples of 16 (the end may pass slot_end)
  Element store;
};

static inline Strip next_strip(const AttendArgs& args, int begin, int most) {
  Strip strip = {begin, begin, store_of(args.lane, begin)};
  while (strip.end < args.slot_end && strip.end - begin < most && store_of(args.lane, strip.end) == strip.store)
    strip.end += kGroup;
  return strip;
}

// Where to prefetch while `slot` is in use: the same kind of group `distance` slots on, in this part or the upcoming.
static inline const char* ahead_group(const AttendArgs& args, int slot, int distance, bool value, const char* fallback) {
  const Lane* lane = &args.lane;
  int target = slot + distance, end = (args.slot_end + kGroup - 1) / kGroup * kGroup;
  if (target >= end) {
    if (!args.upcoming) return fallback;
    target = args.upcoming->slot_begin / kGroup * kGroup + (target - end);
    if (target >= args.upcoming->slot_end) return fallback;
    lane = &args.upcoming->lane;
  }
  Element store = store_of(*lane, target);
  return value ? value_group(*lane, store, target) : key_group(*lane, store, target);
}

// Scores of `rows` queries against a strip, as the store holds the keys (int8 without its scale).
template <class Kind>
static void strip_scores(const AttendArgs& args, const Strip& strip, const char* queries, int rows, int distance,
                         float* scores) {
  const Lane& lane = args.lane;
  const size_t row_bytes = (size_t)lane.block_size * Kind::kPer * Kind::kBBytes;
  // Few rows: four column groups at once, else the sums of one product wait for each other.
  const int most = rows <= kFewRows ? 4 : 2;
  for (int slot = strip.begin, groups; slot < strip.end; slot += groups * kGroup) {
    const char* column[4];
    const char* ahead[4];
    const int left = (strip.end - slot) / kGroup;
    groups = left >= most ? most : left >= 2 ? 2 : 1;
    for (int v = 0; v < groups; ++v) {
      column[v] = key_group(lane, strip.store, slot + v * kGroup);
      if (distance) ahead[v] = ahead_group(args, slot + v * kGroup, distance, false, column[v]);
    }
    Columns b = {column, distance ? ahead : nullptr, 1, lane.k_width / Kind::kPer, row_bytes, row_bytes};
    float* c = scores + (slot - strip.begin);
    if (groups == 4)
      product<Kind, 4>(rows, queries, 0, b, c, kStrip, false);
    else if (groups == 2)
      product<Kind, 2>(rows, queries, 0, b, c, kStrip, false);
    else
      product<Kind, 1>(rows, queries, 0, b, c, kStrip, false);
  }
}

// sum[rows, v_width] += probabilities[rows, strip] values[strip, v_width]
template <class Kind>
static void strip_values(const AttendArgs& args, const Strip& strip, const char* probabilities, int rows, int distance,
                         char* fixed, float* sum) {
  const Lane& lane = args.lane;
  const int groups = (strip.end - strip.begin) / kGroup;
  const size_t element_row = (size_t)lane.v_width * Kind::kPer * Kind::kBBytes;
  const char* base[kStrip / kGroup];
  const char* base_ahead[kStrip / kGroup];
  for (int g = 0; g < groups; ++g) {
    int slot = strip.begin + g * kGroup;
    base[g] = value_group(lane, strip.store, slot);
    if (distance) base_ahead[g] = ahead_group(args, slot, distance, true, base[g]);
    if (slot + kGroup > args.lane_end) {  // unwritten slots may hold anything, NaN included: 0 x NaN is not 0
      const size_t unit = Kind::kPer * Kind::kBBytes;
      const int written = args.lane_end - slot;
      memcpy(fixed, base[g], kGroup / Kind::kPer * element_row);
      for (int j = written; j < kGroup; ++j)
        for (int d = 0; d < lane.v_width; ++d)
          memset(fixed + j / Kind::kPer * element_row + d * unit + j % Kind::kPer * Kind::kBBytes, 0, Kind::kBBytes);
      base[g] = fixed;
    }
  }
  const char* column[4 * kStrip / kGroup];
  const char* ahead[4 * kStrip / kGroup];
  const int most = rows <= kFewRows ? 4 : 2;
  for (int d = 0, nv; d < lane.v_width; d += 16 * nv) {
    const int left = (lane.v_width - d) / 16;
    nv = left >= most ? most : left >= 2 ? 2 : 1;
    for (int g = 0; g < groups; ++g)
      for (int v = 0; v < nv; ++v) {
        size_t offset = (size_t)(d + 16 * v) * Kind::kPer * Kind::kBBytes;
        column[g * nv + v] = base[g] + offset;
        if (distance) ahead[g * nv + v] = base_ahead[g] + offset;
      }
    Columns b = {column, distance ? ahead : nullptr, groups, kGroup / Kind::kPer, element_row, element_row};
    if (nv == 4)
      product<Kind, 4>(rows, probabilities, kGroup * Kind::kABytes, b, sum + d, lane.v_width, true);
    else if (nv == 2)
      product<Kind, 2>(rows, probabilities, kGroup * Kind::kABytes, b, sum + d, lane.v_width, true);
    else
      product<Kind, 1>(rows, probabilities, kGroup * Kind::kABytes, b, sum + d, lane.v_width, true);
  }
}

// Bring the raw scores of one row to units of log 2, and -inf where the row does not see.
static inline void finish_scores(const AttendArgs& args, const Strip& strip, int row, float* s) {
  const int n = strip.end - strip.begin;
  if (strip.store == Element::kInt8)
    for (int j = 0; j < n; j += kGroup) {
      const float* scale = scale_group(args.lane, false, strip.begin + j);
      for (int i = 0; i < kGroup; i += W) vstore(s + j + i, vmul(vload(s + j + i), vload(scale + i)));
    }
  if (args.softcap > 0) {
    vf inverse = vset(1.0f / args.softcap), cap = vset(args.softcap * kLog2E);
    for (int j = 0; j < n; j += W) vstore(s + j, vmul(vtanh(vmul(vload(s + j), inverse)), cap));
  }
  if (args.slope) {
    float slope = args.slope[row] * kLog2E;
    int distance = strip.begin - args.position[row];
    for (int j = 0; j < n; ++j) s[j] += slope * (float)(distance + j);
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

// One step of the online softmax of a row; rescales what was summed so far.
static inline void softmax_row(const AttendArgs& args, const Strip& strip, int row, float* s, char* probabilities,
                               float* sum) {
  const int n = strip.end - strip.begin;
  finish_scores(args, strip, row, s);
  vf top = vload(s);
  for (int j = W; j < n; j += W) top = vmax(top, vload(s + j));
  float peak = vpeak(top), old = args.peak[row];
  if (peak > old) {
    if (old != kMinusInf) {
      float shrink[W];
      vstore(shrink, vexp2(vset(old - peak)));
      vf factor = vset(shrink[0]);
      for (int d = 0; d < args.lane.v_width; d += W) vstore(sum + d, vmul(vload(sum + d), factor));
      args.total[row] *= shrink[0];
    }
    args.peak[row] = old = peak;
  }
  if (old == kMinusInf) {
    for (int j = 0; j < n; j += W) write_probability(args.compute, probabilities, j, vzero());
    return;
  }
  vf shift = vset(old), total = vzero();
  for (int j = 0; j < n; j += W) {
    vf p = vexp2(vsub(vload(s + j), shift));
    total = vadd(total, p);
    if (strip.store == Element::kInt8)
      p = vmul(p, vload(scale_group(args.lane, true, strip.begin + j / kGroup * kGroup) + j % kGroup));
    if (strip.store == Element::kInt8 && strip.begin + j + W > args.lane_end) {  // scales of unwritten slots
      float lanes[W];
      vstore(lanes, p);
      for (int i = 0; i < W; ++i)
        if (strip.begin + j + i >= args.lane_end) lanes[i] = 0;
      p = vload(lanes);
    }
    write_probability(args.compute, probabilities, j, p);
  }
  args.total[row] += vsum(total);
}

#define KVLOOM_BY_STORE(store, compute, call)                                   \
  switch (store) {                                                              \
    case Element::kFloat: call(WeightF32); break;                               \
    case Element::kHalf: call(HalfByF32); break;                                \
    case Element::kBf16:                                                        \
      if (compute == Element::kBf16) { call(WeightBf16); } else { call(Bf16ByF32); } \
      break;                                                                    \
    case Element::kInt8:                                                        \
      if (compute == Element::kBf16) { call(Int8ByBf16); } else { call(Int8ByF32); } \
      break;                                                                    \
  }

static void attend(const AttendArgs& args, char* scratch) {
  float* scores = (float*)scratch;                       // [12, kStrip]
  char* probabilities = scratch + kMaxRows * kStrip * 4; // [12, kRowBytes]
  char* fixed = probabilities + kMaxRows * kRowBytes;
  for (int r = 0; r < args.num_rows; ++r) {
    args.peak[r] = kMinusInf;
    args.total[r] = 0;
  }
  memset(args.sum, 0, (size_t)args.num_rows * args.lane.v_width * 4);
  const int group_bytes = kGroup * (args.lane.k_width + args.lane.v_width) * store_bytes(args.lane.store);
  int distance = (16 << 10) / group_bytes;
  distance = (distance < 1 ? 1 : distance > 8 ? 8 : distance) * kGroup;
  const int most = args.num_rows <= kMaxRows ? kStrip / 2 : kStrip;
  for (int begin = args.slot_begin / kGroup * kGroup; begin < args.slot_end;) {
    Strip strip = next_strip(args, begin, most);
    int ahead = distance;
    for (int r0 = 0; r0 < args.num_rows; r0 += kMaxRows) {
      int rows = args.num_rows - r0 < kMaxRows ? args.num_rows - r0 : kMaxRows;
      bool seen = false;
      for (int r = r0; r < r0 + rows; ++r) seen |= args.last[r] > strip.begin && args.first[r] < strip.end;
      if (!seen) continue;
      const char* queries = args.queries + (size_t)r0 * kRowBytes;
      float* sum = args.sum + (size_t)r0 * args.lane.v_width;
#define KVLOOM_SCORES(Kind) strip_scores<Kind>(args, strip, queries, rows, ahead, scores)
      KVLOOM_BY_STORE(strip.store, args.compute, KVLOOM_SCORES)
      for (int r = 0; r < rows; ++r)
        softmax_row(args, strip, r0 + r, scores + r * kStrip, probabilities + r * kRowBytes,
                    sum + (size_t)r * args.lane.v_width);
#define KVLOOM_VALUES(Kind) strip_values<Kind>(args, strip, probabilities, rows, ahead, fixed, sum)
      KVLOOM_BY_STORE(strip.store, args.compute, KVLOOM_VALUES)
      ahead = 0;
    }
    begin = strip.end;
  }
}

static void mass(const MassArgs& mass_args, char* scratch) {
  const AttendArgs& args = mass_args.attend;
  float* scores = (float*)scratch;
  for (int begin = args.slot_begin / kGroup * kGroup; begin < args.slot_end;) {
    Strip strip = next_strip(args, begin, kStrip);
    vf column[kStrip / W];
    const int n = strip.end - strip.begin;
    for (int j = 0; j < n; j += W) column[j / W] = vzero();
    for (int r0 = 0; r0 < args.num_rows; r0 += kMaxRows) {
      int rows = args.num_rows - r0 < kMaxRows ? args.num_rows - r0 : kMaxRows;
      bool seen = false;
      for (int r = r0; r < r0 + rows; ++r) seen |= args.last[r] > strip.begin && args.first[r] < strip.end;
      if (!seen) continue;
      const char* queries = args.queries + (size_t)r0 * kRowBytes;
      const int ahead = 0;
      KVLOOM_BY_STORE(strip.store, args.compute, KVLOOM_SCORES)
      for (int r = 0; r < rows; ++r) {
        float* s = scores + r * kStrip;
        finish_scores(args, strip, r0 + r, s);
        vf lse = vset(mass_args.lse[r0 + r] * kLog2E);
        for (int j = 0; j < n; j += W) column[j / W] = vadd(column[j / W], vexp2(vsub(vload(s + j), lse)));
      }
    }
    float sums[kStrip];
    for (int j = 0; j < n; j += W) vstore(sums + j, column[j / W]);
    for (int j = 0; j < n; ++j) {
      int slot = strip.begin + j;
      if (slot >= args.slot_begin && slot < args.slot_end) mass_args.mass[slot - args.slot_begin] += sums[j];
    }
    begin = strip.end;
  }
}

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
