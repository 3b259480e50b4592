// Appending to lanes and attending over them, for a packed batch of prefill chunks and decodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "huge_allocator.h"
#include "kernels/kernels.h"
#include "norm.h"
#include "thread_pool.h"

namespace kvloom {

// The lanes of all sequences. `table` [num_seqs, num_lanes, num_columns]: arena addresses in granules;
// `begin`, `end` [num_seqs, num_lanes]: visible slots. Strides are in elements.
struct LaneTable {
  char* arena = nullptr;
  const int32_t* table = nullptr;
  std::ptrdiff_t seq_stride = 0, lane_stride = 0;
  const int32_t* begin = nullptr;
  const int32_t* end = nullptr;
  std::ptrdiff_t bounds_stride = 0;
  int block_size = 0;
  uint32_t block_inverse = 0;
  Store store = Store::kBf16;
  // Optional, for lanes of several stores: segments of lane (s, l) are segment_start[s * num_lanes + l] up to the
  // next entry, in `segment_store` and `segment_end` (columns).
  int num_lanes = 0;
  const int32_t* segment_start = nullptr;
  const int32_t* segment_store = nullptr;
  const int32_t* segment_end = nullptr;
};

// Packed queries: sequence b owns tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1 and row seq_rows[b] of the table.
// A batch may be a stretch of a longer step, with the lanes' ends already those after the whole of it.
struct Batch {
  int num_tokens = 0;  // T
  int num_seqs = 0;    // B
  const int32_t* cu_seqlens = nullptr;
  const int32_t* seq_rows = nullptr;
  const int32_t* later = nullptr;    // [B] tokens of the sequence that the step appends behind these; null: none
  const int32_t* in_step = nullptr;  // [B] tokens of the sequence in the step; null: these

  int count(int b) const { return cu_seqlens[b + 1] - cu_seqlens[b]; }
  int step_count(int b) const { return in_step ? in_step[b] : count(b); }
};

// Widths are those of a head of q, k, v and of what attention makes; in blocks heads have `block_width` of them.
struct LayerShape {
  int num_heads = 0, num_kv_heads = 0, k_width = 0, v_width = 0;
  int lane_offset = 0;
  int window = 0;  // 0: none
};

// Positions of the tokens in each slot of one sequence's lanes, for lanes that lost tokens: [lanes, slots].
struct SlotPositions {
  const int32_t* first = nullptr;  // null: slots are as far apart as their tokens
  std::ptrdiff_t lane_stride = 0;
};

// Queries at position p are multiplied by 1 + scale ln(1 + floor((p + 1) / period)) (Nakanishi, arXiv:2501.19399).
struct Temperature {
  float period = 0;  // 0: they are not
  float scale = 0;
};

struct AttentionCall {
  LaneTable lanes;
  Batch batch;
  LayerShape shape;
  Element compute = Element::kFloat;
  float scale = 1;
  float softcap = 0;
  int chunk = 0;  // positions p and q see each other if p / chunk = q / chunk, in lanes whose slots are positions; 0: all
  const float* sinks = nullptr;   // [H] natural logits that join every row's denominator
  const float* slopes = nullptr;  // [H] ALiBi
  const SlotPositions* slot_positions = nullptr;  // [num_seqs] by row of the table, with slopes; or null
  const float* bias = nullptr;    // natural, [num_seqs, num_lanes, slots]
  std::ptrdiff_t bias_seq_stride = 0, bias_lane_stride = 0;
  Element q_element = Element::kFloat;
  const void* q = nullptr;  // [T, H, k_width], `q_stride` elements between tokens
  std::ptrdiff_t q_stride = 0;
  Element out_element = Element::kFloat;
  void* out = nullptr;  // [T, H * v_width] contiguous per token, `out_stride` elements between tokens; or:
  std::ptrdiff_t out_stride = 0;
  const Tiles* out_tiles = nullptr;  // activations of the next linear layer
  float* lse = nullptr;  // [T, H] natural, sinks included
};

// Memory of a call's partial results; it grows and is kept between calls.
struct Workspace {
  std::vector<float, HugeAllocator<float>> partial;
};

// The whole team attends; keys and values must be visible (barrier before). No barrier after.
void attention(Team& team, const AttentionCall& call, Workspace& workspace);

// mass[seq b][g][slot] += sum over queries and heads of the group of exp(score - lse), for the tokens of `call.batch`.
// `mass` [B, G, num_slots] float32 is zeroed by the caller; slots are the lane's own.
void key_mass(Team& team, const AttentionCall& call, const float* lse, float* mass, std::ptrdiff_t num_slots);

struct AppendCall {
  LaneTable lanes;
  Batch batch;
  LayerShape shape;
  Element element = Element::kFloat;
  void* q = nullptr;  // [T, H, k_width]: normed and rotated in place; null: keys only
  void* k = nullptr;  // [T, G, k_width]
  const void* v = nullptr;
  std::ptrdiff_t q_stride = 0, k_stride = 0, v_stride = 0;  // elements between tokens
  const float* cos_sin = nullptr;  // [T, rotary]: cosines, then sines; null: no rotation
  int rotary = 0;
  float clip = 0;       // bounds all of q, k and v before anything else; 0: nothing
  Norm q_norm, k_norm;  // of each head [k_width]
  bool norm_after_rope = false;
  Temperature temperature;
  const int32_t* positions = nullptr;  // [T], with a temperature
};

// Clip, norm, rotate (or rotate, norm) and store: slot end - n + i of each lane receives token i of the sequence's n. No barrier after.
void append(Team& team, const AppendCall& call);

Lane lane_of(const LaneTable& table, const LayerShape& shape, int seq_row, int kv_head);

// Copy `n` floats times `by` into columns `offset` ... of row `t` of tiles of a float or bf16 product.
void write_tiles(const Kernels& kernel, const Tiles& tiles, int t, int offset, const float* x, float by, int n);

}  // namespace kvloom
