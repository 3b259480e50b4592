// Attention of 1 to 12 query rows, the whole of decode, over a run of parts of one lane with one store. A unit is 16
// slots. Keys of a unit are followed by the values of the one before. So the processor always has independent work, and
// memory is read almost in the order of a block. The pipeline does not stop where a part ends; only the results of parts
// are separate:
//
//   keys 0 | keys 1, values 0 | keys 2, values 1 | ... | values n-1 | keys 0 of the run that this thread reads next
//
// With every line that is used, the line `ahead` units later is prefetched, some 8 KiB: a shorter distance is late, a
// longer one exceeds the buffers. Where that unit follows the one before it in memory, all of it is prefetched with the
// keys, in order, which the hardware prefetcher detects. Longer strips with several groups side by side need fewer
// instructions but are slower from memory, because they read more places at a time, each too briefly for the prefetcher.
#pragma once

#include "strip.h"

namespace KVLOOM_ISA {

constexpr int kFewRows = 6;  // up to so many rows by four column groups fit the registers
constexpr int kAheadBytes = 8192, kMostAhead = 4;
constexpr int kPlaces = 8;  // a power of two above 2 + kMostAhead

// `Rows`: the number of query rows, so that all that is done for each row is laid out at once; 0: any.
// `K`, `V`: the products of keys and of values.
template <class K, class V, int Rows> struct FewRows {
  static constexpr size_t kKeyUnit = K::kPer * K::kBBytes;  // bytes of a column in one row of B
  static constexpr size_t kValueUnit = V::kPer * V::kBBytes;
  static constexpr size_t kKeyLine = kGroup * kKeyUnit, kValueLine = kGroup * kValueUnit;
  static constexpr int kKeyStep = K::kPer * K::kABytes;  // bytes of a row of A that are multiplied by one row of B
  static constexpr int kValueStep = V::kPer * V::kABytes;
  static constexpr int kValueRows = kGroup / V::kPer;
  static constexpr bool kKeyScaled = K::kBBytes == 1, kValueScaled = V::kBBytes == 1;
  static_assert(K::kABytes == V::kABytes, "queries and probabilities are multiplied in the same numbers");
  static_assert(Rows == 0 || W == kGroup, "a unit of a known number of rows is a vector wide");

  struct Place {  // where a unit lies
    const char *key, *value;
    const float *key_scale, *value_scale;
    bool follows;  // a block of its own, behind that of the unit before
  };
  struct Weights {  // what the softmax of a unit leaves for its values
    float* sum;
    bool add, shrinks;
    float shrink[kMaxRows];  // what the sums of earlier units are to be multiplied by
    char* probabilities;     // [rows][kRowBytes]
  };

  AttendArgs args;  // peak and total: of the part that the softmax is in
  const Lane& lane;
  const size_t key_stride, value_stride;  // bytes between the rows of a key and of a value group
  const BlockLayout layout;
  const size_t block_bytes;               // of a block that is a unit with keys as long as values, else 0
  const int num_rows, first, units;       // first: slot of unit 0
  const int ahead;                        // in units
  int part_end;                           // slot
  int seen_begin, seen_end;  // slots that every row sees, and whose scores are complete as they come
  float peak[kMaxRows];      // of the part
  vf total[kMaxRows];        // of the part, by lane of a vector
  float* scores;             // [rows, kGroup]
  char* written;             // a copy of a value group with unwritten slots
  Place places[kPlaces] = {};  // of the units at hand, by unit % kPlaces
  Weights weights[2];        // of an even and of an odd unit

  FewRows(const AttendArgs& a, char* scratch)
      : args(a), lane(a.lane), key_stride((size_t)lane.block_size * kKeyUnit), value_stride((size_t)lane.v_width * kValueUnit),
        layout(layout_of(lane, lane.store)),
        block_bytes(lane.block_size == kGroup && layout.k_bytes() == layout.v_bytes()
                        ? 2 * layout.k_bytes() + kGroup * 4 * (kKeyScaled + kValueScaled)
                        : 0),
        num_rows(a.num_rows), first(a.slot_begin / kGroup * kGroup), units((a.slot_end - first + kGroup - 1) / kGroup),
        ahead(units_ahead(kGroup * (lane.k_width * K::kBBytes + lane.v_width * V::kBBytes))), part_end(a.slot_begin),
        seen_begin(a.slot_begin), seen_end(a.slot_end), scores((float*)scratch) {
    scratch += kMaxRows * kGroup * 4;
    for (Weights& each : weights) {
      each.probabilities = scratch;
      scratch += kMaxRows * kRowBytes;
    }
    written = scratch;
    for (int r = 0; r < num_rows; ++r) {
      if (args.first[r] > seen_begin) seen_begin = args.first[r];
      if (args.last[r] < seen_end) seen_end = args.last[r];
    }
    if (args.softcap > 0 || args.slope || args.bias) seen_end = seen_begin;
  }

  static int units_ahead(int unit_bytes) {
    const int units = (kAheadBytes + unit_bytes / 2) / unit_bytes;
    return units < 1 ? 1 : units > kMostAhead ? kMostAhead : units;
  }
  int rows() const { return Rows ? Rows : num_rows; }
  Place& place_of(int unit) { return places[(unsigned)unit % kPlaces]; }

  // Find a unit of this run, or of the run that follows as if its units were this one's.
  void find(int unit) {
    const AttendArgs* run = &args;
    int slot = first + unit * kGroup;
    Place &place = place_of(unit), &before = place_of(unit - 1);
    if (unit >= units) {
      run = args.upcoming;
      if (run) slot = run->slot_begin / kGroup * kGroup + (unit - units) * kGroup;
      if (!run || slot >= run->slot_end) {
        place = before;
        place.follows = false;
        return;
      }
    }
    const Lane& at = run->lane;
    const int column = column_of(at, slot), within = slot - column * at.block_size;
    prefetch(at.columns + column + 32);  // the table itself falls out of the caches
    const char* block = at.arena + (size_t)(uint32_t)at.columns[column] * 128;
    place.follows = block_bytes && block == before.key + block_bytes;
    place.key = block + (size_t)within * kKeyUnit;
    place.value = block + ((size_t)at.block_size * at.k_width * K::kBBytes + (size_t)within * at.v_width * V::kBBytes);
    if (kKeyScaled) {
      place.key_scale = (const float*)(block + layout.k_scale(within));
      prefetch(place.key_scale);
    }
    if (kValueScaled) {
      place.value_scale = (const float*)(block + layout.v_scale(within));
      prefetch(place.value_scale);
    }
  }

  // Scores of a unit. A row has two sums, of even and of odd rows of B: one alone would wait for itself.
  template <bool Whole> void keys(const char* at, const char* next) {
    vf even[Rows], odd[Rows];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) even[r] = odd[r] = vzero();
    const char* a = args.queries;
    float* const out = scores;
    const size_t stride = key_stride, step = Whole ? 2 * kKeyLine : stride;
#pragma GCC unroll 1
    for (int i = lane.k_width / K::kPer; i > 0; i -= 2) {
      dot_rows(even, a, at);
      prefetch(next);
      if (Whole) prefetch(next + kKeyLine);
      dot_rows(odd, a + kKeyStep, at + stride);
      prefetch(next + step);
      if (Whole) prefetch(next + step + kKeyLine);
      a += 2 * kKeyStep;
      at += 2 * stride;
      next += 2 * step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) vstore(out + r * kGroup, vadd(even[r], odd[r]));
  }
  static inline void dot_rows(vf* sum, const char* a, const char* at) {
    const typename Dot<K>::B line = Dot<K>::b(at);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) sum[r] = Dot<K>::dot(sum[r], Dot<K>::a(a + r * kRowBytes), line);
  }

  void keys(int unit) {
    const Place &place = place_of(unit), &next = place_of(unit + ahead);
    if constexpr (Rows == 0) {
      const Columns b = {&place.key, &next.key, 1, lane.k_width / K::kPer, key_stride, key_stride};
      product<K, 1>(num_rows, args.queries, 0, b, scores, kGroup, false);
    } else if (next.follows) {
      keys<true>(place.key, next.key);
    } else {
      keys<false>(place.key, next.key);
    }
  }

  void close_part() {
    for (int r = 0; r < rows(); ++r) {
      args.peak[r] = peak[r];
      args.total[r] = vsum(total[r]);
    }
  }
  void open_part(int slot) {
    if (slot > args.slot_begin) {
      close_part();
      args.peak += args.part_stride;
      args.total += args.part_stride;
      args.sum += args.part_stride;
    }
    for (int r = 0; r < rows(); ++r) {
      peak[r] = kMinusInf;
      total[r] = vzero();
    }
    part_end = args.part_slots ? (slot / args.part_slots + 1) * args.part_slots : args.slot_end;
  }

  // One step of the online softmax of a row. Returns what the sums of earlier units are now to be multiplied by.
  // `Plain`: the row sees all slots, and their scores need nothing but scales.
  template <bool Plain> float softmax_row(int slot, int r, const Place& place, char* probabilities) {
    float* s = scores + r * kGroup;
    if (!Plain) {
      finish_scores(args, {slot, slot + kGroup, lane.store}, r, s);
    } else if (kKeyScaled) {
      for (int j = 0; j < kGroup; j += W) vstore(s + j, vmul(vload(s + j), vload(place.key_scale + j)));
    }
    vf top = vload(s);
    for (int j = W; j < kGroup; j += W) top = vmax(top, vload(s + j));
    float shrink = 1.0f;
    if (vabove(top, vset(peak[r]))) {
      const float old = peak[r];
      peak[r] = vpeak(top);
      if (old != kMinusInf) {
        vf factor = vexp2(vset(old - peak[r]));
        total[r] = vmul(total[r], factor);
        shrink = vfirst(factor);
      }
    }
    const bool nothing = !Plain && peak[r] == kMinusInf;
    const vf shift = vset(peak[r]);
    for (int j = 0; j < kGroup; j += W) {
      vf p = nothing ? vzero() : vexp2(vsub(vload(s + j), shift));
      total[r] = vadd(total[r], p);
      if (kValueScaled) {
        p = vmul(p, vload(place.value_scale + j));
        if (!Plain && slot + j + W > args.lane_end) {  // scales of unwritten slots
          float lanes[W];
          vstore(lanes, p);
          for (int i = 0; i < W; ++i)
            if (slot + j + i >= args.lane_end) lanes[i] = 0;
          p = vload(lanes);
        }
      }
      if (V::kABytes == 2)
        vstore_bf16((uint16_t*)probabilities + j, p);
      else
        vstore((float*)probabilities + j, p);
    }
    return shrink;
  }

  void softmax(int unit) {
    const int slot = first + unit * kGroup;
    const bool opens = slot >= part_end || unit == 0;
    if (opens) open_part(unit == 0 ? args.slot_begin : slot);
    Weights& left = weights[unit & 1];
    const Place& place = place_of(unit);
    left.sum = args.sum;
    left.add = !opens;
    left.shrinks = false;
    if (slot >= seen_begin && slot + kGroup <= seen_end) {
      for (int r = 0; r < rows(); ++r)
        left.shrink[r] = softmax_row<true>(slot, r, place, left.probabilities + r * kRowBytes);
    } else {
      for (int r = 0; r < rows(); ++r)
        left.shrink[r] = softmax_row<false>(slot, r, place, left.probabilities + r * kRowBytes);
    }
    for (int r = 0; r < rows(); ++r) left.shrinks |= left.shrink[r] != 1.0f;
  }

  // Add values of a unit times their weights to NV column groups of the sums, from `d` on.
  template <int NV> void values(const Weights& from, const char* value, const char* next, int d) {
    value += (size_t)d * kValueUnit;
    next += (size_t)d / kGroup * kValueRows * kValueLine;
    float* const sum = from.sum + d;
    if constexpr (Rows == 0) {
      const char *column[NV], *asked[NV];
      for (int v = 0; v < NV; ++v) {
        column[v] = value + v * kValueLine;
        asked[v] = next + v * kValueLine;
      }
      const Columns b = {column, asked, 1, kValueRows, value_stride, NV * kValueLine};
      product<V, NV>(num_rows, from.probabilities, 0, b, sum, lane.v_width, from.add);
    } else {
      const size_t row_bytes = value_stride, width = lane.v_width;
      const char* a = from.probabilities;
      vf acc[Rows][NV];
      if (from.add) {
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[r][v] = vload(sum + r * width + v * W);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[r][v] = vzero();
      }
#pragma GCC unroll 2
      for (int i = 0; i < kValueRows; ++i) {
        typename Dot<V>::B line[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          line[v] = Dot<V>::b(value + v * kValueLine);
          prefetch(next + v * kValueLine);
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const typename Dot<V>::A weight = Dot<V>::a(a + r * kRowBytes);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[r][v] = Dot<V>::dot(acc[r][v], weight, line[v]);
        }
        a += kValueStep;
        value += row_bytes;
        next += NV * kValueLine;
      }
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) vstore(sum + r * width + v * W, acc[r][v]);
    }
  }

  void values(int unit) {
    const Weights& from = weights[unit & 1];
    const int slot = first + unit * kGroup;
    const char* value = place_of(unit).value;
    const char* next = place_of(unit + 1 + ahead).value;
    if (slot + kGroup > args.lane_end) value = without_unwritten<V>(args, value, slot, written);
    for (int r = 0; from.add && from.shrinks && r < rows(); ++r)
      if (from.shrink[r] != 1.0f) scale_row(from.sum + (size_t)r * lane.v_width, lane.v_width, from.shrink[r]);
    int d = 0;
    if constexpr (Rows <= kFewRows)
      for (; rows() <= kFewRows && d + 4 * kGroup <= lane.v_width; d += 4 * kGroup) values<4>(from, value, next, d);
    for (; d + 2 * kGroup <= lane.v_width; d += 2 * kGroup) values<2>(from, value, next, d);
    if (d < lane.v_width) values<1>(from, value, next, d);
  }

  void run() {
    if (args.upcoming) prefetch(args.upcoming->lane.columns + column_of(args.upcoming->lane, args.upcoming->slot_begin));
    for (int unit = 0; unit <= ahead; ++unit) find(unit);
    for (int unit = 0; unit < units; ++unit) {
      find(unit + ahead + 1);
      keys(unit);
      softmax(unit);
      if (unit) values(unit - 1);
    }
    values(units - 1);
    close_part();
  }
};

template <class K, class V> static void attend_few(const AttendArgs& args, char* scratch) {
#if defined(KVLOOM_AVX512)
  switch (args.num_rows) {
#define KVLOOM_FEW(n) \
  case n: return FewRows<K, V, n>(args, scratch).run();
    KVLOOM_FEW(1) KVLOOM_FEW(2) KVLOOM_FEW(3) KVLOOM_FEW(4) KVLOOM_FEW(5) KVLOOM_FEW(6)
    KVLOOM_FEW(7) KVLOOM_FEW(8) KVLOOM_FEW(9) KVLOOM_FEW(10) KVLOOM_FEW(11) KVLOOM_FEW(12)
#undef KVLOOM_FEW
  }
#else
  FewRows<K, V, 0>(args, scratch).run();
#endif
}

}  // namespace KVLOOM_ISA
