// Attention of 1 to 12 query rows, the whole of decode, over a run of parts of one lane with one store. Strips of up to
// 128 slots go through two passes, a strip apart, so that the processor always has independent work at hand; nothing
// stops where a part ends, only its result goes elsewhere:
//
//   keys 0 | keys 1, values 0 | keys 2, values 1 | ... | values n-1 | keys 0 of the run that this thread reads next
//
// Every pass asks memory for the lines of the next, a line for each that it uses. Where blocks lie is worked out once a
// strip, for branches and table reads between the passes cost more bandwidth than arithmetic does.
#pragma once

#include "strip.h"

namespace KVLOOM_ISA {

constexpr int kFewRows = 6;
constexpr int kFewGroups = 8;  // most column groups of a strip
constexpr int kFewStrip = kFewGroups * kGroup;
// Most bytes of keys of a strip, so that they and the values of the strip before fit the first-level cache.
constexpr int kFewBytes = 16 << 10;

template <class Kind> struct FewRows {
  static constexpr size_t kLine = (size_t)kGroup * Kind::kPer * Kind::kBBytes;
  static constexpr int kValueRows = kGroup / Kind::kPer;

  AttendArgs args;  // peak and total: of the part that the softmax is in
  const Lane& lane;
  const size_t key_stride, value_stride;  // bytes between the rows of a key and of a value group
  const int rows, most;  // most: column groups in registers at once
  const int strip_slots, base, strips;  // base: where the first strip would begin if it were whole
  float *const peak, *const total;  // of the first part
  float* scores;              // [rows, kFewStrip]
  char* probabilities[2];     // of an even and of an odd strip: [rows][kRowBytes]
  char* written;              // copies of groups with unwritten slots
  float shrink[2][kMaxRows];  // what the sums of earlier strips are to be multiplied by

  struct Place {  // of a strip: its column groups
    const char* key[kFewGroups];
    const char* value[kFewGroups];
  };
  struct Lines {  // what one pass reads
    const char* const* group;
    size_t stride;
  };
  Place places[4];  // of the strips at hand, by strip % 4

  FewRows(const AttendArgs& a, char* scratch)
      : args(a), lane(a.lane), key_stride((size_t)lane.block_size * Kind::kPer * Kind::kBBytes),
        value_stride((size_t)lane.v_width * Kind::kPer * Kind::kBBytes), rows(a.num_rows),
        most(rows <= kFewRows ? 4 : 2), strip_slots(strip_length(lane.k_width)),
        base(a.slot_begin / strip_slots * strip_slots), strips((a.slot_end - base + strip_slots - 1) / strip_slots),
        peak(a.peak), total(a.total), scores((float*)scratch) {
    scratch += kMaxRows * kFewStrip * 4;
    probabilities[0] = scratch;
    probabilities[1] = scratch + kMaxRows * kRowBytes;
    written = scratch + 2 * kMaxRows * kRowBytes;
  }

  static int strip_length(int width) {  // a power of two, so that strips divide parts
    int groups = kFewGroups;
    while (groups > 2 && groups * kGroup * width * Kind::kBBytes > kFewBytes) groups /= 2;
    return kGroup * groups;
  }

  int begin_of(int strip) const {
    const int whole = base + strip * strip_slots;
    return whole > args.slot_begin ? whole : args.slot_begin / kGroup * kGroup;
  }
  int groups_of(int strip) const {
    const int whole_end = base + (strip + 1) * strip_slots;
    return ((whole_end < args.slot_end ? whole_end : args.slot_end) - begin_of(strip) + kGroup - 1) / kGroup;
  }
  ptrdiff_t part_of(int strip) const {
    return args.part_slots ? begin_of(strip) / args.part_slots - args.slot_begin / args.part_slots : 0;
  }
  bool opens_part(int strip) const { return strip == 0 || part_of(strip) != part_of(strip - 1); }

  // Find a strip of this run, or of the run that follows as if its strips were this one's.
  void find(int strip) {
    const AttendArgs* part = &args;
    int slot = base + strip * strip_slots;
    Place& place = places[strip % 4];
    if (strip < strips) {
      slot = begin_of(strip);
    } else {
      part = args.upcoming;
      if (part) slot = part->slot_begin / kGroup * kGroup + (strip - strips) * strip_slots;
      if (!part || slot >= part->slot_end) {
        place = places[(strip - 1) % 4];
        return;
      }
    }
    prefetch(part->lane.columns + column_of(part->lane, slot) + 32);  // the table itself falls out of the caches
    const size_t values = (size_t)part->lane.block_size * part->lane.k_width;
    for (int g = 0; g < strip_slots / kGroup; ++g, slot += kGroup) {
      const int group = slot < part->slot_end ? slot : slot - g * kGroup;
      const char* block = block_of(part->lane, group);
      const int within = within_of(part->lane, group);
      place.key[g] = block + (size_t)within * Kind::kPer * Kind::kBBytes;
      place.value[g] = block + (values + (size_t)within * part->lane.v_width) * Kind::kBBytes;
    }
  }

  Lines keys_of(int strip) const { return {places[strip % 4].key, key_stride}; }
  Lines values_of(int strip) const { return {places[strip % 4].value, kLine}; }

  template <int NV> void keys(const Lines& own, const Lines& ahead, int g) {
    Columns b = {own.group + g, ahead.group + g, 1, lane.k_width / Kind::kPer, key_stride, ahead.stride};
    product<Kind, NV>(rows, args.queries, 0, b, scores + g * kGroup, kFewStrip, false);
  }

  void keys(int strip, const Lines& ahead) {
    const Lines own = keys_of(strip);
    const int groups = groups_of(strip);
    int g = 0;
    for (; most == 4 && g + 4 <= groups; g += 4) keys<4>(own, ahead, g);
    for (; g + 2 <= groups; g += 2) keys<2>(own, ahead, g);
    if (g < groups) keys<1>(own, ahead, g);
  }

  void softmax(int strip) {
    const int slot = begin_of(strip);
    const Strip span = {slot, slot + groups_of(strip) * kGroup, lane.store};
    if (opens_part(strip)) {
      args.peak = peak + part_of(strip) * args.part_stride;
      args.total = total + part_of(strip) * args.part_stride;
      for (int r = 0; r < rows; ++r) {
        args.peak[r] = kMinusInf;
        args.total[r] = 0;
      }
    }
    for (int r = 0; r < rows; ++r)
      shrink[strip % 2][r] =
          softmax_row(args, span, r, scores + r * kFewStrip, probabilities[strip % 2] + r * kRowBytes);
  }

  template <int NV>
  void values(const Lines& own, const Lines& ahead, int groups, const char* p, int d, float* sum, bool add) {
    const char* column[NV * kFewGroups];
    const char* next[NV * kFewGroups];
    for (int g = 0; g < groups; ++g)
      for (int v = 0; v < NV; ++v) {
        column[g * NV + v] = own.group[g] + (size_t)(d + kGroup * v) * Kind::kPer * Kind::kBBytes;
        next[g * NV + v] = ahead.group[g] + ((size_t)d / kGroup * kValueRows + v) * ahead.stride;
      }
    Columns b = {column, next, groups, kValueRows, value_stride, NV * ahead.stride};
    product<Kind, NV>(rows, p, kGroup * Kind::kABytes, b, sum + d, lane.v_width, add);
  }

  void values(int strip, const Lines& ahead) {
    const Lines own = values_of(strip);
    const int groups = groups_of(strip);
    float* sum = args.sum + part_of(strip) * args.part_stride;
    const bool add = !opens_part(strip);
    for (int r = 0; add && r < rows; ++r) {
      const float by = shrink[strip % 2][r];
      if (by != 1.0f) scale_row(sum + (size_t)r * lane.v_width, lane.v_width, by);
    }
    for (int g = groups - 1; g >= 0; --g) {
      const int slot = begin_of(strip) + g * kGroup;
      if (slot + kGroup <= args.lane_end) break;
      char* copy = written + g * (size_t)kValueRows * value_stride;
      places[strip % 4].value[g] = without_unwritten<Kind>(args, own.group[g], slot, copy);
    }
    const char* p = probabilities[strip % 2];
    int d = 0;
    for (; most == 4 && d + 4 * kGroup <= lane.v_width; d += 4 * kGroup) values<4>(own, ahead, groups, p, d, sum, add);
    for (; d + 2 * kGroup <= lane.v_width; d += 2 * kGroup) values<2>(own, ahead, groups, p, d, sum, add);
    if (d < lane.v_width) values<1>(own, ahead, groups, p, d, sum, add);
  }

  void run() {
    find(0);
    find(1);
    keys(0, values_of(0));
    softmax(0);
    for (int strip = 1; strip < strips; ++strip) {
      find(strip + 1);
      keys(strip, values_of(strip - 1));
      softmax(strip);
      values(strip - 1, keys_of(strip + 1));
    }
    find(strips + 1);
    values(strips - 1, keys_of(strips + 1));
  }
};

}  // namespace KVLOOM_ISA
