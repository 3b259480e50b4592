#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "attention_plan.h"
#include "isa.h"
#include "step_stretches.h"
#include "wanted_rows.h"

namespace kvloom {

namespace {

// State of one thread while it executes the parts of a layer.
struct Flow {
  std::size_t layer;
  int part = 0;
  const Stretch* stretch;
  Tiles input = {};  // output of the last kNorm
};

class Step {
 public:
  Step(const DecoderModel& model, const StepCall& call, StepMemory& memory, int num_threads)
      : model_(model), call_(call), memory_(memory), kernel_(kernels()), num_tokens_(call.batch.num_tokens),
        stretches_(call.batch, query_block(model.layers.front().shape)), wanted_(call, stretches_) {
    memory.reserve(model, num_tokens_, stretches_.longest(), call.num_logits, call.logits ? 0 : call.num_logits,
                   num_threads);
    if (call.num_logits)
      output_tiles_ = memory.output.tiles(model.output->product, call.num_logits, call.num_logits, model.hidden);
  }

  void run(Team& team) {
    int begin, end;
    team.share(num_tokens_, &begin, &end);
    embed(team, begin, end);
    rotations(begin, end);
    team.barrier();
    for (std::size_t l = 0; l < model_.layers.size(); ++l)
      for (int s = 0; s < stretches_.size(); ++s) layer(team, l, s);
    output(team);
  }

 private:
  static_assert(Stretches::kTokens + kBlockRows <= Stretches::kUncut);  // so kUncut is the longest stretch
  // Rows of one prefill task, and so of any piece of a sequence but its last.
  static int query_block(const LayerShape& shape) {
    return std::max(1, kBlockRows * shape.num_kv_heads / std::max(1, shape.num_heads));
  }

  float* x(int t) { return memory_.x.data() + static_cast<std::size_t>(t) * model_.hidden; }
  float* own_row(const Team& team) { return memory_.own_row[static_cast<std::size_t>(team.id())].data(); }

  void embed(const Team& team, int begin, int end) {
    for (int t = begin; t < end; ++t) {
      unpack_row(*model_.embedding, call_.ids[t], x(t));
      if (model_.embedding_scale != 1)
        for (int i = 0; i < model_.hidden; ++i) x(t)[i] *= model_.embedding_scale;
      if (model_.position_table) {
        unpack_row(*model_.position_table, call_.positions[t], own_row(team));
        kernel_.add(x(t), own_row(team), model_.hidden);
      }
      if (model_.embedding_norm) normalise(kernel_, model_.embedding_norm, x(t), model_.hidden, x(t));
    }
  }

  void rotations(int begin, int end) {
    float* table = memory_.cos_sin.data();
    const float* own = call_.frequencies;
    for (const Rope& rope : model_.ropes) {
      const std::size_t half = rope.inverse_frequency.size();
      int seq = 0;
      for (int t = begin; t < end; ++t) {
        while (call_.batch.cu_seqlens[seq + 1] <= t) ++seq;
        const float* frequency = own ? own + static_cast<std::size_t>(seq) * half : rope.inverse_frequency.data();
        float* row = table + static_cast<std::size_t>(t) * 2 * half;
        for (std::size_t i = 0; i < half; ++i) {
          const float angle = static_cast<float>(call_.positions[t]) * frequency[i];
          row[i] = std::cos(angle) * rope.amplitude[i];
          row[half + i] = std::sin(angle) * rope.amplitude[i];
        }
      }
      table += static_cast<std::size_t>(num_tokens_) * 2 * half;
      if (own) own += static_cast<std::size_t>(call_.batch.num_seqs) * half;
    }
  }

  const float* rotation(int index) const {
    const float* table = memory_.cos_sin.data();
    for (int i = 0; i < index; ++i)
      table += static_cast<std::size_t>(num_tokens_) * 2 * model_.ropes[static_cast<std::size_t>(i)].inverse_frequency.size();
    return table;
  }

  // Inputs of a product over the rows of a stretch: the same memory with the same tiles for each.
  Tiles tiles(StepMemory::Inputs& inputs, const PackedWeight& reader, const Flow& flow) {
    return inputs.tiles(reader.product, stretches_.longest(), flow.stretch->batch.num_tokens, reader.k);
  }

  // One layer over one stretch. Its keys and values are written to the lanes before it attends to them. Those of earlier
  // stretches of the layer are already there, and later ones are not visible.
  void layer(Team& team, std::size_t index, int s) {
    const DecoderLayer& layer = model_.layers[index];
    Flow flow = {index, layer.first, &stretches_[s]};
    if (call_.input_norms) measure(team, flow);
    for (; flow.part < layer.last; ++flow.part) {
      const Part& part = model_.parts[static_cast<std::size_t>(flow.part)];
      switch (part.kind) {
        case PartKind::kNorm: norm(team, part, flow); break;
        case PartKind::kHeads:
          linear(team, {part.weight, &flow.input, Finish::kStore, Element::kFloat, Activation::kSilu,
                        memory_.qkv.data(), static_cast<std::size_t>(part.weight->n), nullptr});
          team.barrier();
          break;
        case PartKind::kAppend:
          append_heads(team, part, flow);
          if (index + 1 == model_.layers.size() && wanted_.fewer()) {
            keep_wanted(team, s, layer.shape);
            flow.stretch = &wanted_[s];
            if (flow.stretch->batch.num_tokens == 0) return;
          }
          break;
        case PartKind::kAttend: attend(team, part, flow); break;
        case PartKind::kUp: up(team, part, flow); break;
        case PartKind::kAdd: add(team, part, flow); break;
        case PartKind::kExperts: add_experts(team, part, flow); break;
      }
    }
  }

  void measure(Team& team, const Flow& flow) {
    int begin, end;
    team.share(flow.stretch->batch.num_tokens, &begin, &end);
    for (int t = flow.stretch->first + begin; t < flow.stretch->first + end; ++t) {
      double squares = 0;
      for (int i = 0; i < model_.hidden; ++i) squares += static_cast<double>(x(t)[i]) * x(t)[i];
      call_.input_norms[flow.layer * static_cast<std::size_t>(num_tokens_) + t] = static_cast<float>(std::sqrt(squares));
    }
  }

  // Each thread norms a single row itself, which is cheaper than a barrier; a batch is shared.
  void norm(Team& team, const Part& part, Flow& flow) {
    const bool single = num_tokens_ == 1;
    flow.input = single ? memory_.own(team.id(), part.reader->product, part.reader->k)
                        : tiles(memory_.normal, *part.reader, flow);
    int begin = 0, end = 1;
    if (!single) team.share(flow.input.num_rows, &begin, &end);
    for (int t = begin; t < end; ++t) {
      kernel_.pack_row(flow.input, t, normal(part.norm, flow.stretch->first + t, own_row(team)));
    }
    if (!single) team.barrier();
  }

  // The norm of row t of the residual stream in `out`, or the row itself where there is none.
  const float* normal(const Norm& norm, int t, float* out) {
    if (!norm) return x(t);
    normalise(kernel_, norm, x(t), model_.hidden, out);
    return out;
  }

  int queries_width(const LayerShape& shape) const { return shape.num_heads * shape.k_width; }
  std::ptrdiff_t heads_stride(const LayerShape& shape) const {
    return queries_width(shape) + static_cast<std::ptrdiff_t>(shape.num_kv_heads) * (shape.k_width + shape.v_width);
  }

  void append_heads(Team& team, const Part& part, const Flow& flow) {
    const LayerShape& shape = model_.layers[flow.layer].shape;
    const std::ptrdiff_t stride = heads_stride(shape);
    float* q = memory_.qkv.data();
    AppendCall store;
    store.lanes = call_.lanes;
    store.batch = flow.stretch->batch;
    store.shape = shape;
    store.q = q;
    store.k = q + queries_width(shape);
    store.v = q + queries_width(shape) + static_cast<std::ptrdiff_t>(shape.num_kv_heads) * shape.k_width;
    store.q_stride = store.k_stride = store.v_stride = stride;
    if (part.rope >= 0) {
      store.rotary = 2 * static_cast<int>(model_.ropes[static_cast<std::size_t>(part.rope)].inverse_frequency.size());
      store.cos_sin = rotation(part.rope) + static_cast<std::ptrdiff_t>(flow.stretch->first) * store.rotary;
    }
    store.clip = part.clip;
    store.temperature = part.temperature;
    store.positions = call_.positions + flow.stretch->first;
    if (part.norm_over_heads) {
      norm_heads(team, part, store);
    } else {
      store.q_norm = part.q_norm;
      store.k_norm = part.k_norm;
      store.norm_after_rope = part.norm_after_rope;
    }
    append(team, store);
    team.barrier();
    if (!call_.queries || team.id() != 0) return;
    const std::size_t width = static_cast<std::size_t>(queries_width(shape));
    for (int i = 0; i < call_.num_queries; ++i) {
      const int t = call_.query_rows[i] - flow.stretch->first;
      if (t >= 0 && t < flow.stretch->batch.num_tokens)
        std::memcpy(call_.queries + (flow.layer * call_.num_queries + i) * width, q + t * stride, width * 4);
    }
  }

  // Norm all heads of q, and of k, of each token at once.
  void norm_heads(Team& team, const Part& part, const AppendCall& store) {
    int begin, end;
    team.share(store.batch.num_tokens, &begin, &end);
    for (int t = begin; t < end; ++t) {
      float* const q = static_cast<float*>(store.q) + t * store.q_stride;
      float* const k = static_cast<float*>(store.k) + t * store.k_stride;
      normalise(kernel_, part.q_norm, q, queries_width(store.shape), q);
      normalise(kernel_, part.k_norm, k, store.shape.num_kv_heads * store.shape.k_width, k);
    }
    team.barrier();
  }

  // Move the wanted rows of a stretch to its front: the residual stream and the queries.
  void keep_wanted(Team& team, int s, const LayerShape& shape) {
    if (team.id() == 0) {
      float* q = memory_.qkv.data();
      const std::ptrdiff_t stride = heads_stride(shape);
      const std::vector<int>& sources = wanted_.sources(s);
      const int first = wanted_[s].first;
      for (std::size_t j = 0; j < sources.size(); ++j) {
        const int t = static_cast<int>(j), from = sources[j];
        if (t == from) continue;
        std::memcpy(x(first + t), x(first + from), static_cast<std::size_t>(model_.hidden) * sizeof(float));
        std::memcpy(q + t * stride, q + from * stride, static_cast<std::size_t>(queries_width(shape)) * sizeof(float));
      }
    }
    team.barrier();
  }

  void attend(Team& team, const Part& part, const Flow& flow) {
    const LayerShape& shape = model_.layers[flow.layer].shape;
    const Tiles made = tiles(memory_.attended, *part.reader, flow);
    clear_share(team, made);
    AttentionCall read;
    read.lanes = call_.lanes;
    read.batch = flow.stretch->batch;
    read.shape = shape;
    const bool low = model_.dtype == Element::kBf16 && exact_in_bf16(call_.lanes.store);
    read.compute = low ? Element::kBf16 : Element::kFloat;
    read.scale = part.scale;
    read.softcap = part.softcap;
    read.chunk = part.chunk;
    read.sinks = part.sinks;
    read.slopes = part.slopes;
    read.slot_positions = call_.slot_positions;
    read.bias = call_.bias;
    read.bias_seq_stride = call_.bias_seq_stride;
    read.bias_lane_stride = call_.bias_lane_stride;
    read.q = memory_.qkv.data();
    read.q_stride = heads_stride(shape);
    const bool quantised = part.reader->product == Product::kInt8Int8;
    if (quantised) {
      read.out = memory_.wide.data();
      read.out_stride = made.k;
    } else {
      read.out_tiles = &made;
    }
    if (call_.lse)
      read.lse = call_.lse + (flow.layer * static_cast<std::size_t>(num_tokens_) + flow.stretch->first) * shape.num_heads;
    attention(team, read, memory_.workspace);
    team.barrier();
    if (quantised) pack_wide(team, made);
  }

  void up(Team& team, const Part& part, const Flow& flow) {
    const Tiles made = tiles(memory_.inner, *part.reader, flow);
    clear_share(team, made);
    const bool quantised = part.reader->product == Product::kInt8Int8;
    const Finish finish = part.weight->gated ? (quantised ? Finish::kGate : Finish::kGateTiles)
                                             : (quantised ? Finish::kActivate : Finish::kActivateTiles);
    LinearArgs inside = {part.weight, &flow.input, finish, Element::kFloat, part.activation, memory_.wide.data(),
                         static_cast<std::size_t>(made.k), &made};
    inside.alpha = part.alpha;
    inside.limit = part.limit;
    inside.beta = part.beta;
    linear(team, inside);
    team.barrier();
    if (quantised) pack_wide(team, made);
  }

  void clear_share(const Team& team, const Tiles& tiles) {
    int begin, end;
    team.share(tiles.num_rows, &begin, &end);
    clear_padding(tiles, begin, end);
  }

  void pack_wide(Team& team, const Tiles& tiles) {
    int begin, end;
    team.share(tiles.num_rows, &begin, &end);
    for (int t = begin; t < end; ++t)
      kernel_.pack_row(tiles, t, memory_.wide.data() + static_cast<std::size_t>(t) * tiles.k);
    team.barrier();
  }

  // Residual += product, through a norm if the part has one.
  void add(Team& team, const Part& part, const Flow& flow) {
    const Tiles in = tiles(part.of_attention ? memory_.attended : memory_.inner, *part.weight, flow);
    const bool direct = !part.norm;
    linear(team, {part.weight, &in, direct ? Finish::kAdd : Finish::kStore, Element::kFloat, Activation::kSilu,
                  direct ? x(flow.stretch->first) : memory_.branch.data(), static_cast<std::size_t>(model_.hidden),
                  nullptr});
    team.barrier();
    if (!direct) add_branch(team, part.norm, flow);
  }

  void add_experts(Team& team, const Part& part, const Flow& flow) {
    const int first = flow.stretch->first, rows = flow.stretch->batch.num_tokens;
    const bool direct = !part.norm;
    if (!direct) {
      int begin, end;
      team.share(rows * model_.hidden, &begin, &end);
      std::fill(memory_.branch.begin() + begin, memory_.branch.begin() + end, 0.0f);
    }
    auto normed = [&](int t, float* scratch) { return normal(part.input_norm, first + t, scratch); };
    experts(team, *part.experts, rows, normed, direct ? x(first) : memory_.branch.data(), model_.hidden, memory_.experts);
    if (!direct) add_branch(team, part.norm, flow);
  }

  // Residual += norm of the rows in `branch`.
  void add_branch(Team& team, const Norm& norm, const Flow& flow) {
    int begin, end;
    team.share(flow.stretch->batch.num_tokens, &begin, &end);
    for (int t = begin; t < end; ++t) {
      float* row = memory_.branch.data() + static_cast<std::size_t>(t) * model_.hidden;
      normalise(kernel_, norm, row, model_.hidden, row);
      kernel_.add(x(flow.stretch->first + t), row, model_.hidden);
    }
    team.barrier();
  }

  void output(Team& team) {
    int begin, end;
    float* row = own_row(team);
    if (call_.hidden) {
      team.share(num_tokens_, &begin, &end);
      for (int t = begin; t < end; ++t)
        normalise(kernel_, model_.final_norm, x(t), model_.hidden,
                  call_.hidden + static_cast<std::size_t>(t) * model_.hidden);
    }
    if (!call_.num_logits) return;
    team.share(call_.num_logits, &begin, &end);
    for (int r = begin; r < end; ++r) {
      normalise(kernel_, model_.final_norm, x(wanted_.row_of(call_.logit_rows[r])), model_.hidden, row);
      kernel_.pack_row(output_tiles_, r, row);
    }
    team.barrier();
    float* logits = call_.logits ? call_.logits : memory_.logits.data();
    linear(team, {model_.output, &output_tiles_, Finish::kStore, Element::kFloat, Activation::kSilu, logits,
                  static_cast<std::size_t>(model_.vocab), nullptr});
    team.barrier();
    for (int r = begin; r < end; ++r) {
      float* at = logits + static_cast<std::size_t>(r) * model_.vocab;
      if (model_.logit_scale != 1)
        for (int i = 0; i < model_.vocab; ++i) at[i] *= model_.logit_scale;
      if (model_.logit_softcap > 0)
        for (int i = 0; i < model_.vocab; ++i) at[i] = model_.logit_softcap * std::tanh(at[i] / model_.logit_softcap);
      if (call_.greedy) call_.greedy[r] = kernel_.argmax(at, model_.vocab);
    }
  }

  const DecoderModel& model_;
  const StepCall& call_;
  StepMemory& memory_;
  const Kernels& kernel_;
  const int num_tokens_;
  const Stretches stretches_;
  const WantedRows wanted_;
  Tiles output_tiles_;
};

}  // namespace

void prepare_steps(const DecoderModel& model, int num_tokens, StepMemory& memory) {
  for (const int tokens : {num_tokens, std::min(num_tokens, Stretches::kUncut)}) {
    const int32_t cu_seqlens[] = {0, tokens}, seq_row = 0, last = tokens - 1;
    StepCall call;
    call.batch.num_tokens = tokens;
    call.batch.num_seqs = 1;
    call.batch.cu_seqlens = cu_seqlens;
    call.batch.seq_rows = &seq_row;
    call.logit_rows = &last;
    call.num_logits = 1;
    const Step sized(model, call, memory, ThreadPool::instance().size());
  }
  memory.make_pages();
}

void decoder_step(const DecoderModel& model, const StepCall& call, StepMemory& memory) {
  if (call.batch.num_tokens == 0) return;
  release_openmp_threads();
  std::optional<Step> step;
  constexpr int kShortStep = 64;  // tokens: a step of milliseconds
  ThreadPool::instance().run([&](Team& team) { step->run(team); },
                             [&](int num_threads) { step.emplace(model, call, memory, num_threads); },
                             call.batch.num_tokens <= kShortStep);
}

}  // namespace kvloom
