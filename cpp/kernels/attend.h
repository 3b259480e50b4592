// Attention of any number of query rows over a lane or a run of its parts, and the key mass of the same scores by their
// log-sum-exp.
#pragma once

#include "attend_few.h"
#include "attend_many.h"

namespace KVLOOM_ISA {

static void attend(const AttendArgs& args, char* scratch) {
  if (args.num_rows <= kMaxRows && args.lane.num_segments == 0 && args.slot_begin < args.slot_end) {
#define KVLOOM_ATTEND(K, V) attend_few<K, V>(args, scratch)
    KVLOOM_BY_STORE(args.lane.store, args.compute, KVLOOM_ATTEND)
    return;
  }
  AttendArgs part = args;
  do {
    if (args.part_slots) part.slot_end = (part.slot_begin / args.part_slots + 1) * args.part_slots;
    if (part.slot_end > args.slot_end) part.slot_end = args.slot_end;
    ManyRows(part, scratch).run();
    part.slot_begin = part.slot_end;
    part.peak += args.part_stride;
    part.total += args.part_stride;
    part.sum += args.part_stride;
  } while (part.slot_begin < args.slot_end);
}

static void join(const float* peaks, const float* totals, const float* sums, ptrdiff_t stride, int count, int width,
                 float* peak, float* total, float* sum) {
  constexpr int kAtOnce = 64;  // parts
  *peak = kMinusInf;
  for (int p = 0; p < count; ++p)
    if (peaks[p * stride] > *peak) *peak = peaks[p * stride];
  *total = 0;
  for (int d = 0; d < width; ++d) sum[d] = 0;
  if (*peak == kMinusInf) return;
  for (int p0 = 0; p0 < count; p0 += kAtOnce) {
    const int n = count - p0 < kAtOnce ? count - p0 : kAtOnce;
    const float* part = sums + p0 * stride;
    float weight[kAtOnce];
    // One by one: a vector load would wait for the scalars in it to reach the cache.
    for (int p = 0; p < n; ++p) weight[p] = vfirst(vexp2(vset(peaks[(p0 + p) * stride] - *peak)));
    for (int p = 0; p < n; ++p) *total += weight[p] * totals[(p0 + p) * stride];
    int d = 0;
    for (; d + 4 * W <= width; d += 4 * W) {
      vf a = vload(sum + d), b = vload(sum + d + W), c = vload(sum + d + 2 * W), e = vload(sum + d + 3 * W);
      for (int p = 0; p < n; ++p) {
        const vf by = vset(weight[p]);
        const float* at = part + p * stride + d;
        a = vfma(by, vload(at), a);
        b = vfma(by, vload(at + W), b);
        c = vfma(by, vload(at + 2 * W), c);
        e = vfma(by, vload(at + 3 * W), e);
      }
      vstore(sum + d, a);
      vstore(sum + d + W, b);
      vstore(sum + d + 2 * W, c);
      vstore(sum + d + 3 * W, e);
    }
    for (; d < width; d += W) {
      vf a = vload(sum + d);
      for (int p = 0; p < n; ++p) a = vfma(vset(weight[p]), vload(part + p * stride + d), a);
      vstore(sum + d, a);
    }
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
      const Strip seen = seen_part(args, strip, r0, rows);
      if (seen.begin >= seen.end) continue;
      const char* queries = args.queries + (size_t)r0 * kRowBytes;
#define KVLOOM_SCORES(K, V) strip_scores<K>(args, seen, queries, rows, 0, scores)
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
