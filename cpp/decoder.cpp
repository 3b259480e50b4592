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

template <class Buffer> void reserve(Buffer& buffer, std::size_t n) {
  if (buffer.size() < n) {
    buffer.clear();  // nothing is kept between steps: no copy
    buffer.resize(n);
  }
}

// Memory for tiles of `rows` rows.
Tiles tiles_in(Product product, int rows, int k, StepMemory::Buffer<char>& data, StepMemory::Buffer<float>& scale) {
  Tiles tiles = tiles_shape(product, rows, k);
  reserve(data, tiles.bytes() + 64);
  reserve(scale, static_cast<std::size_t>(rows));
  tiles.data = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(data.data()) + 63) & ~std::uintptr_t{63});
  tiles.scale = scale.data();
  return tiles;
}

// What lies between the last element of a row and the end of its last slice meets zero weights; it must be finite.
void clear_padding(const Tiles& tiles, int begin, int end) {
  const int bytes = activation_bytes(tiles.product);
  for (int s = 0; s < tiles.num_slices; ++s) {
    const int used = std::clamp(tiles.k - s * tiles.slice_elements, 0, tiles.slice_elements);
    if (used == tiles.slice_elements) continue;
    for (int t = begin; t < end; ++t)
      std::memset(tiles.row(t, s) + used * bytes, 0, static_cast<std::size_t>(tiles.slice_elements - used) * bytes);
  }
}

class Step {
 public:
  Step(const DecoderModel& model, const StepCall& call, StepMemory& memory, int num_threads)
      : model_(model), call_(call), memory_(memory), kernel_(kernels()), num_tokens_(call.batch.num_tokens),
        stretches_(call.batch, query_block(model.layers.front().shape)), wanted_(call, stretches_) {
    const int longest = stretches_.longest();
    const std::size_t hidden = static_cast<std::size_t>(model.hidden), rows = static_cast<std::size_t>(longest);
    std::size_t qkv = 0, wide = 0, rotary = 0;
    bool branch = false;
    for (const DecoderLayer& layer : model.layers) {
      branch |= layer.post_attention_norm || layer.post_mlp_norm;
      qkv = std::max(qkv, static_cast<std::size_t>(layer.qkv->n));
      if (layer.down->product == Product::kInt8Int8) wide = std::max(wide, static_cast<std::size_t>(layer.down->k));
      if (layer.o->product == Product::kInt8Int8) wide = std::max(wide, static_cast<std::size_t>(layer.o->k));
    }
    for (const Rope& rope : model.ropes) rotary += 2 * rope.inverse_frequency.size();
    reserve(memory.x, static_cast<std::size_t>(num_tokens_) * hidden);
    reserve(memory.qkv, rows * qkv);
    reserve(memory.branch, branch ? rows * hidden : 0);
    reserve(memory.wide, rows * wide);
    reserve(memory.cos_sin, static_cast<std::size_t>(num_tokens_) * rotary);
    if (call.num_logits && !call.logits)
      reserve(memory.logits, static_cast<std::size_t>(call.num_logits) * static_cast<std::size_t>(model.vocab));
    const std::size_t threads = static_cast<std::size_t>(num_threads);
    memory.own_tiles.resize(std::max(memory.own_tiles.size(), threads));
    memory.own_row.resize(std::max(memory.own_row.size(), threads));
    reserve(memory.own_scale, threads * 16);
    for (auto& row : memory.own_row) reserve(row, hidden);
    const DecoderLayer& first = model.layers.front();
    hidden_tiles_ = tiles_in(first.qkv->product, longest, model.hidden, memory.hidden_tiles, memory.hidden_scale);
    attention_tiles_ = tiles_in(first.o->product, longest, first.o->k, memory.attention_tiles, memory.attention_scale);
    wide_tiles_ = tiles_in(first.down->product, longest, first.down->k, memory.wide_tiles, memory.wide_scale);
    if (call.num_logits)
      output_tiles_ = tiles_in(model.output->product, call.num_logits, model.hidden, memory.output_tiles,
                               memory.output_scale);
    const Tiles one = tiles_shape(first.qkv->product, 1, model.hidden);
    for (auto& tile : memory.own_tiles) reserve(tile, one.bytes() + 64);
  }

  void run(Team& team) {
    int begin, end;
    team.share(num_tokens_, &begin, &end);
    embed(begin, end);
    rotations(begin, end);
    team.share(stretches_.longest(), &begin, &end);
    clear_padding(attention_tiles_, begin, end);
    clear_padding(wide_tiles_, begin, end);
    team.barrier();
    for (std::size_t l = 0; l < model_.layers.size(); ++l)
      for (int s = 0; s < stretches_.size(); ++s) layer(team, l, s);
    output(team);
  }

 private:
  static_assert(Stretches::kTokens + kBlockRows <= Stretches::kUncut);  // which so is the longest stretch
  // Rows of one prefill task, and so of any piece of a sequence but its last.
  static int query_block(const LayerShape& shape) {
    return std::max(1, kBlockRows * shape.num_kv_heads / std::max(1, shape.num_heads));
  }

  float* x(int t) { return memory_.x.data() + static_cast<std::size_t>(t) * model_.hidden; }

  void embed(int begin, int end) {
    for (int t = begin; t < end; ++t) {
      unpack_row(*model_.embedding, call_.ids[t], x(t));
      if (model_.embedding_scale != 1)
        for (int i = 0; i < model_.hidden; ++i) x(t)[i] *= model_.embedding_scale;
    }
  }

  void rotations(int begin, int end) {
    float* table = memory_.cos_sin.data();
    for (const Rope& rope : model_.ropes) {
      const std::size_t half = rope.inverse_frequency.size();
      for (int t = begin; t < end; ++t) {
        float* row = table + static_cast<std::size_t>(t) * 2 * half;
        for (std::size_t i = 0; i < half; ++i) {
          const float angle = static_cast<float>(call_.positions[t]) * rope.inverse_frequency[i];
          row[i] = std::cos(angle) * rope.amplitude;
          row[half + i] = std::sin(angle) * rope.amplitude;
        }
      }
      table += static_cast<std::size_t>(num_tokens_) * 2 * half;
    }
  }

  const float* rotation(int index) const {
    const float* table = memory_.cos_sin.data();
    for (int i = 0; i < index; ++i)
      table += static_cast<std::size_t>(num_tokens_) * 2 * model_.ropes[static_cast<std::size_t>(i)].inverse_frequency.size();
    return table;
  }

  // The tiles of a stretch: the same memory, cut up in the same way, for each.
  static Tiles of_stretch(Tiles tiles, const Stretch& stretch) {
    tiles.num_rows = stretch.batch.num_tokens;
    return tiles;
  }

  // Normed activations of the residual stream for the next product. A single row is cheaper to norm twice than to
  // wait for; a batch is shared.
  Tiles normed(Team& team, const float* weight, const Stretch& stretch) {
    const std::size_t id = static_cast<std::size_t>(team.id());
    float* row = memory_.own_row[id].data();
    Tiles tiles = of_stretch(hidden_tiles_, stretch);
    if (num_tokens_ == 1) {
      auto& own = memory_.own_tiles[id];
      tiles.data = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(own.data()) + 63) & ~std::uintptr_t{63});
      tiles.scale = memory_.own_scale.data() + id * 16;
    }
    int begin = 0, end = 1;
    if (num_tokens_ > 1) team.share(tiles.num_rows, &begin, &end);
    for (int t = begin; t < end; ++t) {
      kernel_.rms_norm(x(stretch.first + t), weight, model_.hidden, model_.eps, row);
      kernel_.pack_row(tiles, t, row);
    }
    if (num_tokens_ > 1) team.barrier();
    return tiles;
  }

  void pack_wide(Team& team, const Tiles& tiles) {
    int begin, end;
    team.share(tiles.num_rows, &begin, &end);
    for (int t = begin; t < end; ++t)
      kernel_.pack_row(tiles, t, memory_.wide.data() + static_cast<std::size_t>(t) * tiles.k);
    team.barrier();
  }

  // Residual += product, through a norm if the model has one there.
  void add_branch(Team& team, const PackedWeight& weight, const Tiles& in, const float* post_norm, int first) {
    const bool direct = post_norm == nullptr;
    LinearArgs args = {&weight, &in, direct ? Finish::kAdd : Finish::kStore, Element::kFloat, Activation::kSilu,
                       direct ? x(first) : memory_.branch.data(), static_cast<std::size_t>(model_.hidden), nullptr};
    linear(team, args);
    team.barrier();
    if (direct) return;
    int begin, end;
    team.share(in.num_rows, &begin, &end);
    for (int t = begin; t < end; ++t) {
      float* row = memory_.branch.data() + static_cast<std::size_t>(t) * model_.hidden;
      kernel_.rms_norm(row, post_norm, model_.hidden, model_.eps, row);
      kernel_.add(x(first + t), row, model_.hidden);
    }
    team.barrier();
  }

  // Move the rows of a stretch that somebody waits for to its front: the residual stream and, of `q`, the queries.
  void keep_wanted(Team& team, int s, float* q, std::ptrdiff_t stride, int width) {
    if (team.id() == 0) {
      const std::vector<int>& sources = wanted_.sources(s);
      const int first = wanted_[s].first;
      for (std::size_t j = 0; j < sources.size(); ++j) {
        const int t = static_cast<int>(j), from = sources[j];
        if (t == from) continue;
        std::memcpy(x(first + t), x(first + from), static_cast<std::size_t>(model_.hidden) * sizeof(float));
        std::memcpy(q + t * stride, q + from * stride, static_cast<std::size_t>(width) * sizeof(float));
      }
    }
    team.barrier();
  }

  // One layer over one stretch, whose keys and values go to the lanes before it looks at them; earlier stretches of the
  // same layer are there already, and nobody looks at later ones.
  void layer(Team& team, std::size_t index, int s) {
    const Stretch& whole = stretches_[s];
    const DecoderLayer& layer = model_.layers[index];
    const LayerShape& shape = layer.shape;
    const std::ptrdiff_t stride = layer.qkv->n;
    float* q = memory_.qkv.data();
    float* k = q + static_cast<std::ptrdiff_t>(shape.num_heads) * shape.k_width;
    float* v = k + static_cast<std::ptrdiff_t>(shape.num_kv_heads) * shape.k_width;

    Tiles in = normed(team, layer.attention_norm, whole);
    linear(team, {layer.qkv, &in, Finish::kStore, Element::kFloat, Activation::kSilu, q,
                  static_cast<std::size_t>(stride), nullptr});
    team.barrier();

    AppendCall store;
    store.lanes = call_.lanes;
    store.batch = whole.batch;
    store.shape = shape;
    store.q = q;
    store.k = k;
    store.v = v;
    store.q_stride = store.k_stride = store.v_stride = stride;
    if (layer.rope >= 0) {
      store.rotary = 2 * static_cast<int>(model_.ropes[static_cast<std::size_t>(layer.rope)].inverse_frequency.size());
      store.cos_sin = rotation(layer.rope) + static_cast<std::ptrdiff_t>(whole.first) * store.rotary;
    }
    store.q_norm = layer.q_norm;
    store.k_norm = layer.k_norm;
    store.eps = model_.eps;
    append(team, store);
    team.barrier();
    if (call_.queries && team.id() == 0) {
      const std::size_t width = static_cast<std::size_t>(shape.num_heads) * shape.k_width;
      for (int i = 0; i < call_.num_queries; ++i) {
        const int t = call_.query_rows[i] - whole.first;
        if (t >= 0 && t < whole.batch.num_tokens)
          std::memcpy(call_.queries + (index * call_.num_queries + i) * width, q + t * stride, width * 4);
      }
    }

    const bool fewer = index + 1 == model_.layers.size() && wanted_.fewer();
    if (fewer) keep_wanted(team, s, q, stride, shape.num_heads * shape.k_width);
    const Stretch& stretch = fewer ? wanted_[s] : whole;
    if (stretch.batch.num_tokens == 0) return;
    const Tiles attended = of_stretch(attention_tiles_, stretch), wide = of_stretch(wide_tiles_, stretch);

    AttentionCall read;
    read.lanes = call_.lanes;
    read.batch = stretch.batch;
    read.shape = shape;
    const bool low = model_.dtype == Element::kBf16 &&
                     (call_.lanes.store == Element::kBf16 || call_.lanes.store == Element::kInt8);
    read.compute = low ? Element::kBf16 : Element::kFloat;
    read.scale = layer.scale;
    read.softcap = layer.softcap;
    read.sinks = layer.sinks;
    read.slopes = layer.slopes;
    read.bias = call_.bias;
    read.bias_seq_stride = call_.bias_seq_stride;
    read.bias_lane_stride = call_.bias_lane_stride;
    read.q = q;
    read.q_stride = stride;
    const bool quantised = layer.o->product == Product::kInt8Int8;
    if (quantised) {
      read.out = memory_.wide.data();
      read.out_stride = layer.o->k;
    } else {
      read.out_tiles = &attended;
    }
    if (call_.lse)
      read.lse = call_.lse + (index * static_cast<std::size_t>(num_tokens_) + stretch.first) * shape.num_heads;
    attention(team, read, memory_.workspace);
    team.barrier();
    if (quantised) pack_wide(team, attended);
    add_branch(team, *layer.o, attended, layer.post_attention_norm, stretch.first);

    in = normed(team, layer.mlp_norm, stretch);
    const bool quantised_down = layer.down->product == Product::kInt8Int8;
    linear(team, {layer.gate_up, &in, quantised_down ? Finish::kGate : Finish::kGateTiles, Element::kFloat,
                  layer.activation, memory_.wide.data(), static_cast<std::size_t>(layer.down->k), &wide});
    team.barrier();
    if (quantised_down) pack_wide(team, wide);
    add_branch(team, *layer.down, wide, layer.post_mlp_norm, stretch.first);
  }

  void output(Team& team) {
    int begin, end;
    float* row = memory_.own_row[static_cast<std::size_t>(team.id())].data();
    if (call_.hidden) {
      team.share(num_tokens_, &begin, &end);
      for (int t = begin; t < end; ++t)
        kernel_.rms_norm(x(t), model_.final_norm, model_.hidden, model_.eps,
                         call_.hidden + static_cast<std::size_t>(t) * model_.hidden);
    }
    if (!call_.num_logits) return;
    team.share(call_.num_logits, &begin, &end);
    for (int r = begin; r < end; ++r) {
      kernel_.rms_norm(x(wanted_.row_of(call_.logit_rows[r])), model_.final_norm, model_.hidden, model_.eps, row);
      kernel_.pack_row(output_tiles_, r, row);
    }
    team.barrier();
    float* logits = call_.logits ? call_.logits : memory_.logits.data();
    linear(team, {model_.output, &output_tiles_, Finish::kStore, Element::kFloat, Activation::kSilu, logits,
                  static_cast<std::size_t>(model_.vocab), nullptr});
    team.barrier();
    for (int r = begin; r < end; ++r) {
      float* at = logits + static_cast<std::size_t>(r) * model_.vocab;
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
  Tiles hidden_tiles_, attention_tiles_, wide_tiles_, output_tiles_;
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
  for (auto* buffer : {&memory.x, &memory.qkv, &memory.branch, &memory.wide, &memory.cos_sin}) make_pages(*buffer);
  for (auto* buffer : {&memory.hidden_tiles, &memory.attention_tiles, &memory.wide_tiles}) make_pages(*buffer);
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
