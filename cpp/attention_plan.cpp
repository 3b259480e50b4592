#include "attention_plan.h"

#include <algorithm>

namespace kvloom {

namespace {

constexpr int kRunsPerThread = 8;  // at least so many runs, where there are as many parts
constexpr int kLongestRun = 16;

// Most parts of a run: long runs have fewer starts, short ones balance the threads.
int run_length(const AttentionCall& call, int num_threads) {
  const LayerShape& shape = call.shape;
  int slots = 0;
  for (int b = 0; b < call.batch.num_seqs; ++b) {
    const int row = call.batch.seq_rows[b];
    slots += lane_end(call.lanes, call.batch, b, shape.lane_offset) - lane_begin(call.lanes, row, shape.lane_offset);
  }
  return std::clamp(slots / kContextPart * shape.num_kv_heads / (num_threads * kRunsPerThread), 1, kLongestRun);
}

}  // namespace

AttentionPlan attention_plan(const AttentionCall& call, int num_threads) {
  AttentionPlan plan;
  const LayerShape& shape = call.shape;
  const int heads = shape.num_heads / shape.num_kv_heads, run = run_length(call, num_threads);
  plan.tasks.reserve(static_cast<std::size_t>(call.batch.num_seqs) * static_cast<std::size_t>(shape.num_kv_heads));
  for (int pass = 0; pass < 2; ++pass) {  // whole-context tasks first: they are the long ones
    for (int b = 0; b < call.batch.num_seqs; ++b) {
      const int n = call.batch.count(b);
      const int in_step = call.batch.step_count(b);
      const bool split = in_step * heads <= kSplitRows || (in_step <= kShortStep && heads <= kSplitRows);
      // K and V that several groups of rows read one after another stay in a cache.
      const int longest = n > tokens_at_once(heads) ? 1 : run;
      if (n == 0 || split != (pass == 1)) continue;
      const int row = call.batch.seq_rows[b];
      const int block = split ? n : std::max(1, kBlockRows / heads);
      for (int q1 = n; q1 > 0;) {  // from the end: the longest first
        const int q0 = std::max(0, (q1 - 1) / block * block);
        for (int g = 0; g < shape.num_kv_heads; ++g) {
          const int first = lane_begin(call.lanes, row, shape.lane_offset + g);
          const int last = lane_end(call.lanes, call.batch, b, shape.lane_offset + g);
          int begin = first, end = last - n + q1;
          if (shape.window) begin = std::max(begin, last - n + q0 + 1 - shape.window);
          if (!split) {
            plan.tasks.push_back({b, g, q0, q1, begin, end, 0, -1, false});
            continue;
          }
          // A part lies within 256 slots and within one store; a run of parts within one store.
          const std::size_t first_task = plan.tasks.size();
          Stores stores(lane_of(call.lanes, shape, row, g));
          Split whole = {b, g, 0, plan.partial_floats};
          int in_run = 0;
          for (int s = begin; whole.num_parts == 0 || s < end; ++whole.num_parts) {
            const int store_end = stores.run_end(s);
            const int stop = std::min({end, (s / kContextPart + 1) * kContextPart, store_end});
            if (in_run == 0) {
              plan.tasks.push_back({b, g, q0, q1, s, stop, 0, plan.partial_floats});
            } else {
              plan.tasks.back().end = stop;
            }
            plan.partial_floats += part_floats(n * heads, block_width(shape.v_width));
            in_run = in_run + 1 == longest || stop == store_end ? 0 : in_run + 1;
            s = stop;
          }
          if (plan.tasks.size() - first_task > 1) {
            plan.splits.push_back(whole);
            continue;
          }
          Task& only = plan.tasks.back();
          only.partial = -1;
          if (whole.num_parts > 1) {
            only.num_parts = whole.num_parts;
            plan.own_floats = std::max(plan.own_floats, plan.partial_floats - whole.partial);
          }
          plan.partial_floats = whole.partial;
        }
        q1 = q0;
      }
    }
  }
  return plan;
}

}  // namespace kvloom
