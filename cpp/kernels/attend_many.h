// Attention of many query rows, the whole of prefill: tiles of 12 rows over strips of slots that share a store.
//
//   slots of a strip   | the first a row sees | seen by all rows of the tile ........ | diagonal |
//   softmax              careful                scores and 2^x within the registers     careful
//
// The shift of a row's exponents is a whole number, taken from the first slots that it sees. It stays, since floating
// point is as precise at any size, until a score lies kSlack above it; rescaling then multiplies by a power of two. So
// both ways give the same bits, and a row's result does not depend on the rows beside it.
#pragma once

#include "attend_few.h"

namespace KVLOOM_ISA {

constexpr int kStrip = 512;  // most slots per strip

// Most slots per strip so that a row of probabilities fits a row of a tile.
static inline int strip_slots(Element compute) { return compute == Element::kBf16 ? kStrip : kStrip / 2; }

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
  Store store = store_of(*lane, target);
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

// 2^x for x <= 127. Probabilities that are rounded to bf16 (2e-3) are served by degree 4, error below 4e-6.
static inline vf vpower([[maybe_unused]] Element compute, vf x) {
#if defined(KVLOOM_AVX512)
  if (compute == Element::kBf16) {
    vf f = _mm512_reduce_ps(x, 1);
    vf r = vset(1.353416779e-2f);
    r = vfma(r, f, vset(5.201146122e-2f));
    r = vfma(r, f, vset(2.414427562e-1f));
    r = vfma(r, f, vset(6.930038347e-1f));
    r = vfma(r, f, vset(1.000002593f));
    return _mm512_scalef_ps(r, x);
  }
#endif
  return vexp2(x);
}

constexpr float kSlack = 60;  // in units of log 2: neither a probability nor a sum of them nears the largest float

// Tiles of up to 12 rows of one task.
class ManyRows {
 public:
  ManyRows(const AttendArgs& args, char* scratch) : args_(args), lane_(args.lane) {
    scores_ = (float*)scratch;
    fresh_ = scores_ + kMaxRows * kStrip;
    totals_ = fresh_ + kMaxRows * W;
    probabilities_ = (char*)(totals_ + (size_t)args.num_rows * W);
    fixed_ = probabilities_ + kMaxRows * kRowBytes;
    const BlockLayout layout = layout_of(lane_, lane_.store);
    const int group_bytes = (int)(kGroup * (layout.k_bytes() + layout.v_bytes()) / lane_.block_size);
    const int groups = (16 << 10) / group_bytes;
    distance_ = (groups < 1 ? 1 : groups > 8 ? 8 : groups) * kGroup;
  }

  void run() {
    for (int r = 0; r < args_.num_rows; ++r) args_.peak[r] = kMinusInf;
    memset(totals_, 0, (size_t)args_.num_rows * W * 4);
    memset(args_.sum, 0, (size_t)args_.num_rows * lane_.v_width * 4);
    const int longest = strip_slots(args_.compute);
    for (int begin = args_.slot_begin / kGroup * kGroup; begin < args_.slot_end;) {
      const Strip strip = next_strip(args_, begin, longest - begin % longest);
      ahead_ = distance_;
      for (int r0 = 0; r0 < args_.num_rows; r0 += kMaxRows) {
        row0_ = r0;
        rows_ = args_.num_rows - r0 < kMaxRows ? args_.num_rows - r0 : kMaxRows;
        const Strip seen = seen_part(args_, strip, r0, rows_);  // near the diagonal no row sees much of a strip
        if (seen.begin >= seen.end) continue;
#define KVLOOM_TILE(K, V) tile<K, V>(seen)
        KVLOOM_BY_STORE(seen.store, args_.compute, KVLOOM_TILE)
        ahead_ = 0;
      }
      begin = strip.end;
    }
    for (int r = 0; r < args_.num_rows; ++r) args_.total[r] = vsum(vload(totals_ + (size_t)r * W));
  }

 private:
  const char* queries() const { return args_.queries + (size_t)row0_ * kRowBytes; }

  template <class K, class V> void tile(const Strip& seen) {
    static_assert(K::kABytes == V::kABytes, "queries and probabilities are multiplied in the same numbers");
    float* sum = args_.sum + (size_t)row0_ * lane_.v_width;
    memset(fresh_, 0, sizeof(float) * kMaxRows * W);
    if (!in_registers<K>(seen)) {
      memset(fresh_, 0, sizeof(float) * kMaxRows * W);
      careful<K>(seen, seen, true);
    }
    for (int r = 0; r < rows_; ++r) {
      float* total = totals_ + (size_t)(row0_ + r) * W;
      vstore(total, vadd(vload(total), vload(fresh_ + r * W)));
    }
    strip_values<V>(args_, seen, probabilities_, rows_, ahead_, fixed_, sum);
  }

  // Probabilities of `part` of a strip, any masks and extras. A row that would have to be rescaled is if `may_rescale`,
  // else the answer is false.
  template <class Kind> bool careful(const Strip& seen, const Strip& part, bool may_rescale) {
    if (part.begin >= part.end) return true;
    strip_scores<Kind>(args_, part, queries(), rows_, ahead_, scores_);
    const int n = part.end - part.begin, at = (part.begin - seen.begin) * Kind::kABytes;
    for (int r = 0; r < rows_; ++r) {
      float* s = scores_ + r * kStrip;
      finish_scores(args_, part, row0_ + r, s);
      vf top = vload(s);
      for (int j = W; j < n; j += W) top = vmax(top, vload(s + j));
      const float peak = vpeak(top), old = args_.peak[row0_ + r];
      if (peak > old + kSlack) {
        if (old != kMinusInf) {
          if (!may_rescale) return false;
          rescale(row0_ + r, old - __builtin_ceilf(peak));
        }
        args_.peak[row0_ + r] = __builtin_ceilf(peak);
      }
      write(part, r, s, probabilities_ + r * kRowBytes + at);
    }
    return true;
  }

  // The row's probabilities of `part`, and their sums by lane of a vector.
  void write(const Strip& part, int r, const float* s, char* out) {
    const int n = part.end - part.begin;
    const float peak = args_.peak[row0_ + r];
    if (peak == kMinusInf) {
      for (int j = 0; j < n; j += W) write_probability(args_.compute, out, j, vzero());
      return;
    }
    const vf shift = vset(peak);
    vf total = vload(fresh_ + r * W);
    for (int j = 0; j < n; j += W) {
      vf p = vpower(args_.compute, vsub(vload(s + j), shift));
      total = vadd(total, p);
      if (v_side(part.store).scaled) p = by_scale(part, j, p);
      write_probability(args_.compute, out, j, p);
    }
    vstore(fresh_ + r * W, total);
  }

  // Probabilities by the scales of their values; those of unwritten slots may be anything.
  vf by_scale(const Strip& part, int j, vf p) const {
    p = vmul(p, vload(value_scales(lane_, part.store, part.begin + j / kGroup * kGroup) + j % kGroup));
    if (part.begin + j + W <= args_.lane_end) return p;
    float lanes[W];
    vstore(lanes, p);
    for (int i = 0; i < W; ++i)
      if (part.begin + j + i >= args_.lane_end) lanes[i] = 0;
    return vload(lanes);
  }

  void rescale(int row, float exponent) {
    const float by = exponent < -126 ? 0.0f : __builtin_ldexpf(1.0f, (int)exponent);
    scale_row(totals_ + (size_t)row * W, W, by);
    scale_row(args_.sum + (size_t)row * lane_.v_width, lane_.v_width, by);
  }

#if defined(KVLOOM_AVX512)
  // As `careful`, with what all rows see kept in the registers. False: nothing is valid, a row has to be rescaled or has
  // seen nothing yet.
  template <class Kind> bool in_registers(const Strip& seen) {
    if (k_side(seen.store).scaled || v_side(seen.store).scaled || args_.softcap > 0 || args_.slope || args_.bias || rows_ < kMaxRows / 2)
      return false;
    int low = args_.slot_begin, high = args_.slot_end;
    bool opens = false;
    for (int r = row0_; r < row0_ + rows_; ++r) {
      low = args_.first[r] > low ? args_.first[r] : low;
      high = args_.last[r] < high ? args_.last[r] : high;
      opens |= args_.peak[r] == kMinusInf;
    }
    low = low > seen.begin ? (low + kGroup - 1) / kGroup * kGroup : seen.begin;
    if (opens) low += 2 * kGroup;
    if (high > seen.end) high = seen.end;
    const int pairs = (high - low) / (2 * kGroup);
    if (pairs <= 0) return false;
    high = low + pairs * 2 * kGroup;
    if (!careful<Kind>(seen, {seen.begin, low, seen.store}, false)) return false;
    float shift[kMaxRows];
    for (int r = 0; r < kMaxRows; ++r) {
      shift[r] = r < rows_ ? args_.peak[row0_ + r] : -kMinusInf;  // rows beyond the last are ignored
      if (shift[r] == kMinusInf) return false;
    }
    vf top = vset(kMinusInf);
    for (int slot = low; slot < high; slot += 2 * kGroup) {
      char* out = probabilities_ + (slot - seen.begin) * Kind::kABytes;
      top = ahead_ ? pair<Kind, true>(seen.store, slot, shift, out, top) : pair<Kind, false>(seen.store, slot, shift, out, top);
    }
    if (vpeak(top) > kSlack) return false;
    return careful<Kind>(seen, {high, seen.end, seen.store}, false);
  }

  // Twelve rows by two column groups; returns the largest of `top` and the scores above their shifts. The order of each
  // sum is that of tile.h.
  template <class Kind, bool Ahead> vf pair(Store store, int slot, const float* shift, char* out, vf top) {
    const char* column[2] = {key_group(lane_, store, slot), key_group(lane_, store, slot + kGroup)};
    const char* next[2] = {column[0], column[1]};
    if (Ahead)
      for (int v = 0; v < 2; ++v) next[v] = ahead_group(args_, slot + v * kGroup, ahead_, false, column[v]);
    const size_t row_bytes = (size_t)lane_.block_size * Kind::kPer * Kind::kBBytes;
    const int steps = lane_.k_width / Kind::kPer;
    const char* row = queries();
    vf acc[kMaxRows][2];
#pragma GCC unroll 16
    for (int m = 0; m < kMaxRows; ++m) acc[m][0] = acc[m][1] = vzero();
    size_t at = 0;
#pragma GCC unroll 2
    for (int i = 0; i < steps; ++i) {
      const typename Dot<Kind>::B b0 = Dot<Kind>::b(column[0] + at), b1 = Dot<Kind>::b(column[1] + at);
      if (Ahead) {
        prefetch(next[0] + at);
        prefetch(next[1] + at);
      }
#pragma GCC unroll 16
      for (int m = 0; m < kMaxRows; ++m) {
        const typename Dot<Kind>::A a = Dot<Kind>::a(row + m * kRowBytes);
        acc[m][0] = Dot<Kind>::dot(acc[m][0], a, b0);
        acc[m][1] = Dot<Kind>::dot(acc[m][1], a, b1);
      }
      row += Kind::kPer * Kind::kABytes;
      at += row_bytes;
    }
    constexpr Element compute = Kind::kABytes == 2 ? Element::kBf16 : Element::kFloat;
#pragma GCC unroll 16
    for (int m = 0; m < kMaxRows; ++m) {
      const vf by = vset(shift[m]);
      const vf s0 = vsub(acc[m][0], by), s1 = vsub(acc[m][1], by);
      top = vmax(vmax(s0, s1), top);
      const vf p0 = vpower(compute, s0), p1 = vpower(compute, s1);
      vstore(fresh_ + m * W, vadd(vadd(vload(fresh_ + m * W), p0), p1));
      write_probability(compute, out + m * kRowBytes, 0, p0);
      write_probability(compute, out + m * kRowBytes, W, p1);
    }
    return top;
  }
#else
  template <class Kind> bool in_registers(const Strip&) { return false; }
#endif

  const AttendArgs& args_;
  const Lane& lane_;
  float* scores_;        // [12, kStrip]
  float* fresh_;         // [12, W] sums of the probabilities of the strip at hand
  float* totals_;        // [rows, W] of those before
  char* probabilities_;  // [12, kRowBytes]
  char* fixed_;          // a value group with unwritten slots cleared
  int distance_;         // slots between what is used and what is fetched
  int ahead_ = 0;        // the same while the first tile passes, 0 for the others
  int row0_ = 0, rows_ = 0;
};

}  // namespace KVLOOM_ISA
