// The parts of a decoder's layers: a flat list of fused parts, each a small struct, which a step executes in order.
//
//   one after the other   norm heads append attend add   norm up add
//   in parallel           norm heads append attend       norm up     add add
//   with experts          norm heads append attend add   experts
//
// From the residual stream `norm` computes the input of the next product, `heads` q, k and v; `append` writes k and v to the
// lanes; `attend` and `up` compute the input of a later `add`, which adds its product to the stream. `experts` adds a mixture
// of experts of the norm of the stream. Another order of the same parts is another kind of layer.
#pragma once

#include <vector>

#include "attention.h"
#include "experts.h"
#include "norm.h"
#include "weight.h"

namespace kvloom {

enum class PartKind : int { kNorm, kHeads, kAppend, kAttend, kUp, kAdd, kExperts };

struct Part {
  PartKind kind = PartKind::kNorm;
  const PackedWeight* weight = nullptr;  // kHeads [(H + G) k_width + G v_width, hidden], kUp (gated or not), kAdd
  const PackedWeight* reader = nullptr;  // kNorm, kAttend, kUp: the product that reads what this part makes
  Norm norm;                             // kNorm; kAdd, kExperts: of what is added. Where there is none, x as it is
  // kAppend
  Norm q_norm, k_norm;
  bool norm_over_heads = false;  // of all heads of q, and of k, at once
  bool norm_after_rope = false;  // of each head, when it was rotated
  float clip = 0;
  Temperature temperature;
  int rope = -1;  // index of its rotary embedding, -1: none
  // kAttend
  float scale = 1, softcap = 0;
  int chunk = 0;  // a query sees its own chunk of so many tokens; 0: all that the window holds
  const float* sinks = nullptr;   // [H] or null
  const float* slopes = nullptr;  // [H] or null
  // kUp
  Activation activation = Activation::kSilu;
  float alpha = 0, limit = 0, beta = 0;  // of kXielu
  // kAdd: true for the product of attention's output, false for that of `up`
  bool of_attention = false;
  // kExperts
  const ExpertsLayer* experts = nullptr;
  Norm input_norm;
};

// Parts [first, last) of the model's, over lanes of one shape.
struct DecoderLayer {
  LayerShape shape;
  int first = 0, last = 0;
};

struct Rope {
  std::vector<float> inverse_frequency;  // [rotary / 2] radians per position
  std::vector<float> amplitude;          // [rotary / 2], multiplies cosines and sines
};

struct DecoderModel {
  int hidden = 0;
  int vocab = 0;
  Element dtype = Element::kFloat;  // kBf16: attention multiplies in bf16 where the store allows it
  const PackedWeight* embedding = nullptr;  // [vocab, hidden]
  float embedding_scale = 1;
  const PackedWeight* position_table = nullptr;  // [positions, hidden], a row of which is added to each embedding; or null
  Norm embedding_norm;
  std::vector<DecoderLayer> layers;
  std::vector<Part> parts;
  std::vector<Rope> ropes;
  Norm final_norm;
  const PackedWeight* output = nullptr;  // [vocab, hidden]; the same object as the embedding if tied
  float logit_scale = 1;
  float logit_softcap = 0;
};

}  // namespace kvloom
