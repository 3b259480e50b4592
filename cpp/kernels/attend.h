// Attention of any number of query rows over a lane or a run of its parts, online over strips of slots that share a
// store; and the key mass that a log-sum-exp makes of the same scores.
#pragma once

#include "attend_few.h"

namespace KVLOOM_ISA {

constexpr int kStrip = 256;  // most slots per strip: a row of probabilities must fit a row of a tile

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
    if (slot + kGroup > args.lane_end) base[g] = without_unwritten<Kind>(args, base[g], slot, fixed);
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

// The part of a strip that any of `rows` rows from `r0` on sees, in whole column groups; empty when none does.
static inline Strip seen_part(const AttendArgs& args, const Strip& strip, int r0, int rows) {
  int first = args.first[r0], last = args.last[r0];
  for (int r = r0 + 1; r < r0 + rows; ++r) {
    first = args.first[r] < first ? args.first[r] : first;
    last = args.last[r] > last ? args.last[r] : last;
  }
  const int low = first / kGroup * kGroup, high = (last + kGroup - 1) / kGroup * kGroup;
  return {low > strip.begin ? low : strip.begin, high < strip.end ? high : strip.end, strip.store};
}

static void attend_part(const AttendArgs& args, char* scratch) {
  float* scores = (float*)scratch;                        // [12, kStrip]
  char* probabilities = scratch + kMaxRows * kStrip * 4;  // [12, kRowBytes]
  char* fixed = probabilities + kMaxRows * kRowBytes;
  for (int r = 0; r < args.num_rows; ++r) {
    args.peak[r] = kMinusInf;
    args.total[r] = 0;
  }
  memset(args.sum, 0, (size_t)args.num_rows * args.lane.v_width * 4);
  const int group_bytes = kGroup * (args.lane.k_width + args.lane.v_width) * store_bytes(args.lane.store);
  int distance = (16 << 10) / group_bytes;
  distance = (distance < 1 ? 1 : distance > 8 ? 8 : distance) * kGroup;
  for (int begin = args.slot_begin / kGroup * kGroup; begin < args.slot_end;) {
    Strip strip = next_strip(args, begin, kStrip);
    int ahead = distance;
    for (int r0 = 0; r0 < args.num_rows; r0 += kMaxRows) {
      int rows = args.num_rows - r0 < kMaxRows ? args.num_rows - r0 : kMaxRows;
      const Strip seen = seen_part(args, strip, r0, rows);  // near the diagonal much of a strip is nobody's
      if (seen.begin >= seen.end) continue;
      const char* queries = args.queries + (size_t)r0 * kRowBytes;
      float* sum = args.sum + (size_t)r0 * args.lane.v_width;
#define KVLOOM_SCORES(Kind) strip_scores<Kind>(args, seen, queries, rows, ahead, scores)
      KVLOOM_BY_STORE(seen.store, args.compute, KVLOOM_SCORES)
      for (int r = 0; r < rows; ++r) {
        const float shrink = softmax_row(args, seen, r0 + r, scores + r * kStrip, probabilities + r * kRowBytes);
        if (shrink != 1.0f) scale_row(sum + (size_t)r * args.lane.v_width, args.lane.v_width, shrink);
      }
#define KVLOOM_VALUES(Kind) strip_values<Kind>(args, seen, probabilities, rows, ahead, fixed, sum)
      KVLOOM_BY_STORE(seen.store, args.compute, KVLOOM_VALUES)
      ahead = 0;
    }
    begin = strip.end;
  }
}

static void attend(const AttendArgs& args, char* scratch) {
  if (args.num_rows <= kMaxRows && args.lane.num_segments == 0 && args.slot_begin < args.slot_end) {
#define KVLOOM_FEW(Kind) FewRows<Kind>(args, scratch).run()
    KVLOOM_BY_STORE(args.lane.store, args.compute, KVLOOM_FEW)
    return;
  }
  AttendArgs part = args;
  do {
    if (args.part_slots) part.slot_end = (part.slot_begin / args.part_slots + 1) * args.part_slots;
    if (part.slot_end > args.slot_end) part.slot_end = args.slot_end;
    attend_part(part, scratch);
    part.slot_begin = part.slot_end;
    part.peak += args.part_stride;
    part.total += args.part_stride;
    part.sum += args.part_stride;
  } while (part.slot_begin < args.slot_end);
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
      const Strip seen = seen_part(args, strip, r0, rows);
      if (seen.begin >= seen.end) continue;
      const char* queries = args.queries + (size_t)r0 * kRowBytes;
      const int ahead = 0;
      KVLOOM_BY_STORE(seen.store, args.compute, KVLOOM_SCORES)
      for (int r = 0; r < rows; ++r) {
        float* s = scores + r * kStrip;
        finish_scores(args, seen, r0 + r, s);
        vf lse = vset(mass_args.lse[r0 + r] * kLog2E);
        vf* at = column + (seen.begin - strip.begin) / W;
        for (int j = 0; j < seen.end - seen.begin; j += W) at[j / W] = vadd(at[j / W], vexp2(vsub(vload(s + j), lse)));
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

}  // namespace KVLOOM_ISA
