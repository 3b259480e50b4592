// The tasks of one attention call. Only the length of runs depends on the number of threads.
//
//   context of one sequence and KV head   |  part  |  part  |  part  |  part  |  part |
//   tasks                                 |           run            |      run       |
//
// A part has a result of its own, which depends on its slots alone; results of parts are joined at the end. Rows of a split
// context go to the kernel a few at a time, so that those of several tokens are computed as those of one are.
#pragma once

#include <algorithm>
#include <climits>
#include <cstddef>
#include <vector>

#include "attention.h"

namespace kvloom {

constexpr int kContextPart = 256;  // slots of one part of a split context; fixed, so results do not depend on threads
constexpr int kSplitRows = 48;     // up to that many rows a context is split,
constexpr int kShortStep = 16;     // or for up to so many tokens of a sequence, if those of one are that few
constexpr int kBlockRows = 96;     // rows of one prefill task

// Rows of queries [q0, q1) of a sequence, all heads of one group, over slots [begin, end): the whole context, or a run
// of consecutive parts of a split one.
struct Task {
  int seq, kv_head, q0, q1, begin, end;
  int num_parts;           // parts that the task joins; 0: none, or other tasks have parts of the same context
  std::ptrdiff_t partial;  // if joined elsewhere: offset of the result of its first part, in floats; else -1
  bool split = true;       // of a context that is split where it is longer than a part
};

// Rows whose context is split among several tasks, and their parts' results.
struct Split {
  int seq, kv_head, num_parts;
  std::ptrdiff_t partial;
};

struct AttentionPlan {
  std::vector<Task> tasks;
  std::vector<Split> splits;
  std::ptrdiff_t partial_floats = 0;
  std::ptrdiff_t own_floats = 0;  // most results of parts that a task joins itself
};

// Tokens whose rows go to the kernel together where a context is split.
inline int tokens_at_once(int heads) { return std::max(1, kTileRows / heads); }

// Layout of the results of a part: [rows] peaks, [rows] totals, then [rows, width] sums from a new cache line on, so that
// no vector of them crosses two lines.
inline std::ptrdiff_t part_sums(int rows) { return (static_cast<std::ptrdiff_t>(rows) * 2 + 15) / 16 * 16; }
inline std::ptrdiff_t part_floats(int rows, int width) { return part_sums(rows) + static_cast<std::ptrdiff_t>(rows) * width; }

// Every thread of a call computes the same plan.
AttentionPlan attention_plan(const AttentionCall& call, int num_threads);

// The runs of slots of one lane that have one store, asked for in ascending order.
class Stores {
 public:
  explicit Stores(const Lane& lane) : lane_(lane) {}
  // The slot behind the run that `slot` lies in.
  int run_end(int slot) {
    seek(slot);
    return segment_ < lane_.num_segments ? lane_.segment_end[segment_] * lane_.block_size : INT_MAX;
  }
  Store of(int slot) {
    seek(slot);
    return segment_ < lane_.num_segments ? static_cast<Store>(lane_.segment_store[segment_]) : lane_.store;
  }

 private:
  void seek(int slot) {
    const int column = divide_by_block(slot, lane_.block_inverse);
    const int32_t* ends = lane_.segment_end;
    if (segment_ < lane_.num_segments && column >= ends[segment_])
      segment_ = static_cast<int>(std::upper_bound(ends + segment_, ends + lane_.num_segments, column) - ends);
  }
  Lane lane_;
  int segment_ = 0;
};

inline int lane_begin(const LaneTable& t, int row, int lane) { return t.begin[row * t.bounds_stride + lane]; }
// Where a lane of sequence `b` ends once the batch is appended.
inline int lane_end(const LaneTable& t, const Batch& batch, int b, int lane) {
  return t.end[batch.seq_rows[b] * t.bounds_stride + lane] - (batch.later ? batch.later[b] : 0);
}

}  // namespace kvloom
