// A mixture of experts: a router chooses a few of many gated MLPs for each token, and their results are added up.
//
//   rows -> router -> choice of k of E a token -> tokens grouped by expert -> gate and up, by expert -> down, by columns
//
// An expert's weight is read once a call, for all tokens that chose it. Each thread owns columns of the result and adds
// the experts in the order of their numbers, the shared one last: a token's result does not depend on its batch.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "huge_allocator.h"
#include "weight.h"

namespace kvloom {

// The experts of a token and the factors of their results. Scores are softmax or sigmoid of the logits.
// Experts are chosen by score + selection_bias; with groups, only of the `kept_groups` ones of E / `groups` neighbours
// whose `group_best` best choices sum highest. The multiplier is the score, divided by the sum over the chosen (+ 1e-20)
// if `normalise`, times `scale`; with `scale_input` it multiplies what the expert reads. With a `jitter`, each multiplier
// is the softmax over the logits near the highest that was not chosen yet (SparseMixer-v2, arXiv:2409.12136).
struct Router {
  int per_token = 1;
  bool scale_input = false;
  float jitter = 0;  // 0: not so
  bool sigmoid = false;
  bool normalise = true;
  float scale = 1;
  int groups = 1;
  int kept_groups = 1;
  int group_best = 1;
  const float* selection_bias = nullptr;  // [E] or null
};

struct Expert {
  const PackedWeight* gate_up = nullptr;  // gated [2 intermediate, hidden]
  const PackedWeight* down = nullptr;     // [hidden, intermediate]
};

struct ExpertsLayer {
  const PackedWeight* router = nullptr;  // kFloat [E, hidden]; [E + 1, hidden] if the shared expert has a gate
  Router routing;
  std::vector<Expert> experts;  // E, of one shape and product
  Expert shared;                // passed by every token, or null; it reads what the others read
  Activation activation = Activation::kSilu;
  float alpha = 0, limit = 0;  // of kClampedGate

  int hidden() const { return router->k; }
  bool shared_gate() const { return router->n > static_cast<int>(experts.size()); }
};

// Choose `per_token` of `num_experts` by logits [num_experts]: numbers in ascending order and the factor of each.
void choose_experts(const Router& router, const float* logits, int num_experts, int32_t* chosen, float* share);

// Buffers of a call, which grow with the batch, and counters of reads.
struct ExpertsMemory {
  template <class T> using Buffer = std::vector<T, HugeAllocator<T>>;
  // Tokens of one expert: entries [first, first + inner.num_rows) of `token` and `share`.
  struct Group {
    const Expert* expert;
    int first;
    Tiles in, inner;
    bool scaled;  // the rows are multiplied by `share` as they come in
  };
  struct Task {
    int group, panel_begin, panel_end, tile_begin, tile_end;
  };
  Buffer<char> row_tiles, router_tiles, group_tiles, inner_tiles;
  Buffer<float> row_scale, router_scale, group_scale, inner_scale, logits, share_of, share, wide;
  std::vector<int32_t> chosen, token;
  std::vector<Group> groups;
  std::vector<Task> tasks;
  std::uint64_t read_bytes = 0;    // of weights: the distinct experts of each call, shared ones included
  std::uint64_t experts_read = 0;  // distinct routed experts of each call
};

// y[t] (float32, `y_stride` apart) += the mixture of row t. `row(t, scratch)` returns row t [hidden] in float32; it is
// called once for each t, and may write it to `scratch` [hidden]. By the whole team; a barrier at the end.
void experts(Team& team, const ExpertsLayer& layer, int num_tokens,
             const std::function<const float*(int, float*)>& row, float* y, std::ptrdiff_t y_stride,
             ExpertsMemory& memory);

}  // namespace kvloom
