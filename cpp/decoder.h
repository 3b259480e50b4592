// One step of a decoder-only transformer over a packed batch, in one call: token ids in, logits out.
#pragma once

#include <vector>

#include "attention.h"
#include "huge_allocator.h"
#include "weight.h"

namespace kvloom {

struct DecoderLayer {
  LayerShape shape;
  const PackedWeight* qkv = nullptr;      // [(H + G) k_width + G v_width, hidden]
  const PackedWeight* o = nullptr;        // [hidden, H v_width]
  const PackedWeight* gate_up = nullptr;  // gated [2 intermediate, hidden]
  const PackedWeight* down = nullptr;     // [hidden, intermediate]
  const float* attention_norm = nullptr;  // [hidden]
  const float* mlp_norm = nullptr;
  const float* post_attention_norm = nullptr;  // null: the residual is added as it is
  const float* post_mlp_norm = nullptr;
  const float* q_norm = nullptr;  // [k_width] or null
  const float* k_norm = nullptr;
  const float* sinks = nullptr;   // [H] or null
  const float* slopes = nullptr;  // [H] or null
  int rope = -1;                  // index of its rotary embedding, -1: none
  float scale = 1;
  float softcap = 0;
  Activation activation = Activation::kSilu;
};

struct Rope {
  std::vector<float> inverse_frequency;  // [rotary / 2] radians per position
  float amplitude = 1;                   // multiplies cosines and sines
};

struct DecoderModel {
  int hidden = 0;
  int vocab = 0;
  float eps = 0;
  float embedding_scale = 1;
  float logit_softcap = 0;
  Element dtype = Element::kFloat;  // kBf16: attention multiplies in bf16 where the store allows it
  const PackedWeight* embedding = nullptr;  // [vocab, hidden]
  const PackedWeight* output = nullptr;     // [vocab, hidden]; the same object if tied
  const float* final_norm = nullptr;
  std::vector<DecoderLayer> layers;
  std::vector<Rope> ropes;
};

struct StepCall {
  LaneTable lanes;  // `end` already counts the new tokens
  Batch batch;
  const int32_t* ids = nullptr;        // [T]
  const int32_t* positions = nullptr;  // [T]
  const float* bias = nullptr;         // per slot, as in AttentionCall
  std::ptrdiff_t bias_seq_stride = 0, bias_lane_stride = 0;
  const int32_t* logit_rows = nullptr;  // [R] tokens whose logits are wanted
  int num_logits = 0;
  float* logits = nullptr;    // [R, vocab] or null
  int32_t* greedy = nullptr;  // [R] arg max of the logits, first of equals; or null
  float* hidden = nullptr;    // [T, hidden] after the final norm; or null
  const int32_t* query_rows = nullptr;  // [Q] tokens whose rotated queries are wanted
  int num_queries = 0;
  float* queries = nullptr;  // [L, Q, H k_width] unscaled, of equal shape in all layers; or null
  float* lse = nullptr;      // [L, T, H] or null
};

// Buffers that persist between steps; they grow with the batch.
struct StepMemory {
  template <class T> using Buffer = std::vector<T, HugeAllocator<T>>;
  Buffer<float> x, qkv, branch, wide, cos_sin, logits;
  Buffer<char> hidden_tiles, attention_tiles, wide_tiles, output_tiles;
  Buffer<float> hidden_scale, attention_scale, wide_scale, output_scale;
  std::vector<std::vector<char>> own_tiles;  // per thread, batch of one
  std::vector<std::vector<float>> own_row;
  std::vector<float> own_scale;
  Workspace workspace;
};

// Make the buffers of a step over `num_tokens` tokens of one sequence, and their pages, ahead of the first one.
void prepare_steps(const DecoderModel& model, int num_tokens, StepMemory& memory);

void decoder_step(const DecoderModel& model, const StepCall& call, StepMemory& memory);

}  // namespace kvloom
