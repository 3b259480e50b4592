// One step of a decoder-only transformer over a packed batch, in one call: token ids in, logits out.
#pragma once

#include "parts.h"
#include "step_memory.h"

namespace kvloom {

struct StepCall {
  LaneTable lanes;  // `end` already counts the new tokens
  Batch batch;
  const int32_t* ids = nullptr;        // [T]
  const int32_t* positions = nullptr;  // [T]
  const float* frequencies = nullptr;  // [ropes, B, rotary / 2], for each sequence; null: those of the ropes
  const float* bias = nullptr;         // per slot, as in AttentionCall
  std::ptrdiff_t bias_seq_stride = 0, bias_lane_stride = 0;
  const SlotPositions* slot_positions = nullptr;  // as in AttentionCall
  const int32_t* logit_rows = nullptr;  // [R] tokens whose logits are computed
  int num_logits = 0;
  float* logits = nullptr;    // [R, vocab] or null
  int32_t* greedy = nullptr;  // [R] arg max of the logits, first of equals; or null
  float* hidden = nullptr;    // [T, hidden] after the final norm; or null
  const int32_t* query_rows = nullptr;  // [Q] tokens whose rotated queries are returned
  int num_queries = 0;
  float* queries = nullptr;  // [L, Q, H k_width] unscaled, of equal shape in all layers; or null
  float* lse = nullptr;      // [L, T, H] or null
  float* input_norms = nullptr;  // [L, T] 2-norms of the input of each layer; or null
};

// Allocate the buffers of a step over `num_tokens` tokens of one sequence, and their pages, before the first step.
void prepare_steps(const DecoderModel& model, int num_tokens, StepMemory& memory);

void decoder_step(const DecoderModel& model, const StepCall& call, StepMemory& memory);

}  // namespace kvloom
