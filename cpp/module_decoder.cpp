// The Python interface of the decoder: parts are added one by one, then steps run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <deque>

#include "decoder.h"
#include "module_arrays.h"
#include "module_experts.h"
#include "step_stretches.h"

namespace nb = nanobind;

namespace kvloom {

namespace {

using FloatMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatCube = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using LongMatrix = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using IntOut = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void expect(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// A norm as Python passes it: weight, bias or None, whether it is a LayerNorm, epsilon.
using NormTuple = std::tuple<FloatVector, std::optional<FloatVector>, bool, float>;

class DecoderObject {
 public:
  DecoderObject(int hidden, int vocab, bool low, nb::object embedding, float embedding_scale,
                std::optional<nb::object> position_table, std::optional<NormTuple> embedding_norm) {
    model_.hidden = hidden;
    model_.vocab = vocab;
    model_.dtype = low ? Element::kBf16 : Element::kFloat;
    model_.embedding = weight(embedding, vocab, hidden);
    model_.embedding_scale = embedding_scale;
    if (position_table) model_.position_table = weight(*position_table, -1, hidden);
    model_.embedding_norm = norm(embedding_norm, hidden);
  }

  void set_output(nb::object output, const NormTuple& final_norm, float scale, float softcap) {
    model_.output = weight(output, model_.vocab, model_.hidden);
    model_.final_norm = norm(final_norm, model_.hidden);
    model_.logit_scale = scale;
    model_.logit_softcap = softcap;
  }

  int add_rope(const FloatVector& inverse_frequency, const FloatVector& amplitude) {
    expect(inverse_frequency.shape(0) == amplitude.shape(0), "each frequency of a rope has an amplitude");
    expect(model_.ropes.empty() || model_.ropes[0].inverse_frequency.size() == inverse_frequency.shape(0),
           "all ropes rotate equally many elements");
    Rope rope;
    rope.inverse_frequency.assign(inverse_frequency.data(), inverse_frequency.data() + inverse_frequency.shape(0));
    rope.amplitude.assign(amplitude.data(), amplitude.data() + amplitude.shape(0));
    model_.ropes.push_back(rope);
    return static_cast<int>(model_.ropes.size()) - 1;
  }

  void add_layer(const ShapeTuple& shape) {
    expect_read();
    DecoderLayer layer;
    LayerShape& s = layer.shape;
    std::tie(s.num_heads, s.num_kv_heads, s.k_width, s.v_width, s.lane_offset, s.window) = shape;
    expect(s.num_kv_heads > 0 && s.num_heads % s.num_kv_heads == 0, "query heads must be a multiple of KV heads");
    layer.first = layer.last = static_cast<int>(model_.parts.size());
    model_.layers.push_back(layer);
  }

  void add_norm(const std::optional<NormTuple>& of) { part(PartKind::kNorm).norm = norm(of, model_.hidden); }

  void add_heads(nb::object product) {
    const LayerShape& s = shape();
    const PackedWeight* w = weight(product, (s.num_heads + s.num_kv_heads) * s.k_width + s.num_kv_heads * s.v_width,
                                   model_.hidden);
    read_by(PartKind::kNorm, w);
    part(PartKind::kHeads).weight = w;
  }

  // `place` is 0 for norms of each head, 1 of each head after its rotation, 2 of all heads at once.
  void add_append(std::optional<NormTuple> q_norm, std::optional<NormTuple> k_norm, int rope, float clip, int place,
                  std::tuple<float, float> temperature) {
    const LayerShape& s = shape();
    expect(place >= 0 && place <= 2 && (place < 2 || clip == 0), "norms are of heads, of rotated or of all unclipped heads");
    expect_last(PartKind::kHeads);
    expect(rope < static_cast<int>(model_.ropes.size()), "the layer names a rope that was not added");
    expect(rope < 0 || 2 * static_cast<int>(model_.ropes[static_cast<std::size_t>(rope)].inverse_frequency.size()) <= s.k_width,
           "the rotary width exceeds the key width");
    Part& added = part(PartKind::kAppend);
    added.norm_after_rope = place == 1;
    added.norm_over_heads = place == 2 && q_norm && k_norm;
    added.q_norm = norm(q_norm, s.k_width * (place == 2 ? s.num_heads : 1));
    added.k_norm = norm(k_norm, s.k_width * (place == 2 ? s.num_kv_heads : 1));
    std::tie(added.temperature.period, added.temperature.scale) = temperature;
    added.rope = rope;
    added.clip = clip;
  }

  void add_attend(std::optional<FloatVector> sinks, std::optional<FloatVector> slopes, float scale, float softcap, int chunk) {
    const LayerShape& s = shape();
    expect(chunk == 0 || chunk == s.window, "a layer that attends in chunks has a window of one");
    expect_last(PartKind::kAppend);
    Part& added = part(PartKind::kAttend);
    if (sinks) added.sinks = vector(*sinks, s.num_heads);
    if (slopes) added.slopes = vector(*slopes, s.num_heads);
    added.scale = scale;
    added.softcap = softcap;
    added.chunk = chunk;
  }

  void add_up(nb::object product, int activation, std::tuple<float, float, float> curve) {
    const PackedWeight* w = weight(product, -1, model_.hidden, true);
    read_by(PartKind::kNorm, w);
    Part& added = part(PartKind::kUp);
    added.weight = w;
    added.activation = static_cast<Activation>(activation);
    std::tie(added.alpha, added.limit, added.beta) = curve;
  }

  void add_product(nb::object product, bool of_attention, std::optional<NormTuple> post_norm) {
    const LayerShape& s = shape();
    const PackedWeight* w = weight(product, model_.hidden, -1);
    const PackedWeight* made = read_by(of_attention ? PartKind::kAttend : PartKind::kUp, w);
    expect(w->k == (of_attention ? s.num_heads * s.v_width : made->gated ? made->n / 2 : made->n),
           "a weight does not have the shape that its place asks for");
    Part& added = part(PartKind::kAdd);
    added.weight = w;
    added.of_attention = of_attention;
    added.norm = norm(post_norm, model_.hidden);
  }

  void add_experts(nb::object mixture, std::optional<NormTuple> post_norm) {
    const ExpertsLayer& layer = nb::cast<ExpertsObject&>(mixture).layer();
    expect_last(PartKind::kNorm);
    expect(layer.hidden() == model_.hidden, "the experts have another width than the model");
    owners_.push_back(mixture);
    const Norm input = model_.parts.back().norm;  // which the experts apply themselves: their router reads float32
    model_.parts.pop_back();
    --model_.layers.back().last;
    --unread_;
    Part& added = part(PartKind::kExperts);
    added.experts = &layer;
    added.input_norm = input;
    added.norm = norm(post_norm, model_.hidden);
  }

  std::uint64_t expert_bytes() const { return memory_.experts.read_bytes; }

  void prepare(int num_tokens) {
    expect_complete();
    expect(num_tokens > 0, "a step has tokens");
    nb::gil_scoped_release release;
    prepare_steps(model_, num_tokens, memory_);
  }

  void step(const LanesObject& lanes, const IntVector& ids, const IntVector& positions, const IntVector& cu_seqlens,
            const IntVector& seq_rows, const IntVector& logit_rows, std::optional<FloatMatrix> logits,
            std::optional<IntOut> greedy, std::optional<FloatMatrix> hidden, std::optional<IntVector> query_rows,
            std::optional<FloatCube> queries, std::optional<FloatCube> lse, std::optional<FloatCube> bias,
            std::optional<FloatMatrix> input_norms, std::optional<FloatCube> frequencies,
            std::optional<LongMatrix> slot_positions) {
    StepCall call;
    call.lanes = lanes.table;
    call.batch = batch_of(lanes, cu_seqlens, seq_rows);
    const int tokens = call.batch.num_tokens;
    expect_complete();
    expect(static_cast<int>(ids.shape(0)) == tokens && static_cast<int>(positions.shape(0)) == tokens,
           "ids and positions must have cu_seqlens[-1] entries");
    for (int t = 0; t < tokens; ++t) {
      expect(ids.data()[t] >= 0 && ids.data()[t] < model_.vocab, "a token id lies outside the vocabulary");
      expect(!model_.position_table || (positions.data()[t] >= 0 && positions.data()[t] < model_.position_table->n),
             "a position lies outside the table of learned positions");
    }
    for (const DecoderLayer& layer : model_.layers) {
      const LayerShape& s = layer.shape;
      check_slots(lanes, call.batch,
                  shape_of(lanes, {s.num_heads, s.num_kv_heads, s.k_width, s.v_width, s.lane_offset, s.window}));
    }
    const int rows = static_cast<int>(logit_rows.shape(0));
    for (int r = 0; r < rows; ++r)
      expect(logit_rows.data()[r] >= 0 && logit_rows.data()[r] < tokens, "a logit row lies outside the batch");
    call.ids = ids.data();
    call.positions = positions.data();
    call.logit_rows = logit_rows.data();
    call.num_logits = rows;
    if (logits) {
      expect(static_cast<int>(logits->shape(0)) == rows && static_cast<int>(logits->shape(1)) == model_.vocab,
             "logits must be [logit rows, vocab]");
      call.logits = logits->data();
    }
    if (greedy) {
      expect(static_cast<int>(greedy->shape(0)) == rows, "greedy must be [logit rows]");
      call.greedy = greedy->data();
    }
    if (hidden) {
      expect(static_cast<int>(hidden->shape(0)) == tokens && static_cast<int>(hidden->shape(1)) == model_.hidden,
             "hidden must be [T, hidden]");
      call.hidden = hidden->data();
    }
    const std::size_t layers = model_.layers.size();
    const LayerShape& shape = model_.layers.front().shape;
    if (queries) {
      expect(query_rows.has_value(), "queries need query_rows");
      call.num_queries = static_cast<int>(query_rows->shape(0));
      for (int i = 0; i < call.num_queries; ++i)
        expect(query_rows->data()[i] >= 0 && query_rows->data()[i] < tokens, "a query row lies outside the batch");
      expect(queries->shape(0) == layers && static_cast<int>(queries->shape(1)) == call.num_queries &&
                 static_cast<int>(queries->shape(2)) == shape.num_heads * shape.k_width,
             "queries must be [layers, query rows, heads * key width]");
      call.query_rows = query_rows->data();
      call.queries = queries->data();
    }
    if (lse) {
      expect(lse->shape(0) == layers && static_cast<int>(lse->shape(1)) == tokens &&
                 static_cast<int>(lse->shape(2)) == shape.num_heads,
             "lse must be [layers, T, heads]");
      call.lse = lse->data();
    }
    if (bias) {
      expect(static_cast<int>(bias->shape(0)) == lanes.num_seqs && static_cast<int>(bias->shape(1)) == lanes.num_lanes &&
                 static_cast<int>(bias->shape(2)) >= lanes.num_columns * lanes.table.block_size,
             "bias must be [num_seqs, num_lanes, slots]");
      call.bias = bias->data();
      call.bias_lane_stride = static_cast<std::ptrdiff_t>(bias->shape(2));
      call.bias_seq_stride = call.bias_lane_stride * lanes.num_lanes;
    }
    if (input_norms) {
      expect(input_norms->shape(0) == layers && static_cast<int>(input_norms->shape(1)) == tokens,
             "input norms must be [layers, T]");
      call.input_norms = input_norms->data();
    }
    if (frequencies) {
      expect(frequencies->shape(0) == model_.ropes.size() && static_cast<int>(frequencies->shape(1)) == call.batch.num_seqs &&
                 frequencies->shape(2) == model_.ropes.front().inverse_frequency.size(),
             "frequencies must be [ropes, sequences, rotary / 2]");
      call.frequencies = frequencies->data();
    }
    std::vector<SlotPositions> positions_of_slots;
    if (slot_positions) {
      expect(static_cast<int>(slot_positions->shape(0)) == lanes.num_seqs && slot_positions->shape(1) == 2,
             "slot positions must be [num_seqs, 2]: an address and the slots of a lane");
      for (int row = 0; row < lanes.num_seqs; ++row)
        positions_of_slots.push_back({reinterpret_cast<const int32_t*>(slot_positions->data()[2 * row]),
                                      static_cast<std::ptrdiff_t>(slot_positions->data()[2 * row + 1])});
      call.slot_positions = positions_of_slots.data();
    }
    nb::gil_scoped_release release;
    decoder_step(model_, call, memory_);
  }

 private:
  const LayerShape& shape() const {
    expect(!model_.layers.empty(), "parts belong to a layer; add one first");
    return model_.layers.back().shape;
  }
  Part& part(PartKind kind) {
    shape();
    model_.parts.emplace_back();
    model_.parts.back().kind = kind;
    ++model_.layers.back().last;
    unread_ += made_to_be_read(kind);
    return model_.parts.back();
  }
  static bool made_to_be_read(PartKind kind) {
    return kind == PartKind::kNorm || kind == PartKind::kAttend || kind == PartKind::kUp;
  }
  // The product `w` reads the output of the last part of `kind` in the layer, which must have no other reader; returns the
  // weight of that part. A norm must precede its reader directly, because unwanted rows are dropped between other parts.
  const PackedWeight* read_by(PartKind kind, const PackedWeight* w) {
    if (kind == PartKind::kNorm) expect_last(kind);
    for (int i = static_cast<int>(model_.parts.size()) - 1; !model_.layers.empty() && i >= model_.layers.back().first; --i) {
      Part& source = model_.parts[static_cast<std::size_t>(i)];
      if (source.kind != kind || source.reader) continue;
      source.reader = w;
      --unread_;
      return source.weight;
    }
    throw std::invalid_argument("a product has nothing to read: its layer has no such part before it");
  }
  void expect_last(PartKind kind) const {
    const bool there = !model_.layers.empty() && model_.layers.back().last > model_.layers.back().first;
    expect(there && model_.parts.back().kind == kind, "the parts of a layer are in no order that can be run");
  }
  void expect_read() const { expect(unread_ == 0, "a part of the layer makes what no product reads"); }
  void expect_complete() const {
    expect(!model_.layers.empty() && model_.output, "the decoder has no layers or no output");
    expect_read();
  }
  // `any` lets the weight be gated.
  const PackedWeight* weight(const nb::object& object, int n, int k, bool any = false) {
    const PackedWeight& w = nb::cast<PackedWeightObject&>(object).weight;
    expect((n < 0 || w.n == n) && (k < 0 || w.k == k) && (any || !w.gated),
           "a weight does not have the shape that its place asks for");
    owners_.push_back(object);
    return &w;
  }
  const float* vector(const FloatVector& source, int n) {
    expect(static_cast<int>(source.shape(0)) == n, "a norm, sink or slope vector has the wrong length");
    vectors_.emplace_back(source.data(), source.data() + n);
    return vectors_.back().data();
  }
  Norm norm(const std::optional<NormTuple>& of, int n) {
    if (!of) return {};
    const auto& [scale, bias, centred, eps] = *of;
    return {vector(scale, n), bias ? vector(*bias, n) : nullptr, centred, eps};
  }

  DecoderModel model_;
  int unread_ = 0;  // parts of the last layer whose output no product reads yet
  StepMemory memory_;
  std::deque<std::vector<float>> vectors_;
  std::vector<nb::object> owners_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
  using nb::arg;
  m.attr("LONGEST_STRETCH") = Stretches::kUncut;
  nb::class_<DecoderObject>(m, "Decoder")
      .def(nb::init<int, int, bool, nb::object, float, std::optional<nb::object>, std::optional<NormTuple>>(), arg(), arg(),
           arg(), arg(), arg(), arg().none(), arg().none())
      .def("set_output", &DecoderObject::set_output)
      .def("add_rope", &DecoderObject::add_rope)
      .def("add_layer", &DecoderObject::add_layer)
      .def("add_norm", &DecoderObject::add_norm, arg().none())
      .def("add_heads", &DecoderObject::add_heads)
      .def("add_append", &DecoderObject::add_append, arg().none(), arg().none(), arg(), arg(), arg(), arg())
      .def("add_attend", &DecoderObject::add_attend, arg().none(), arg().none(), arg(), arg(), arg())
      .def("add_up", &DecoderObject::add_up)
      .def("add_product", &DecoderObject::add_product, arg(), arg(), arg().none())
      .def("add_experts", &DecoderObject::add_experts, arg(), arg().none())
      .def_prop_ro("expert_bytes", &DecoderObject::expert_bytes)
      .def("prepare", &DecoderObject::prepare, arg("num_tokens"))
      .def("step", &DecoderObject::step, arg("lanes"), arg("ids"), arg("positions"), arg("cu_seqlens"), arg("seq_rows"),
           arg("logit_rows"), arg("logits").none(), arg("greedy").none(), arg("hidden").none(), arg("query_rows").none(),
           arg("queries").none(), arg("lse").none(), arg("bias").none(), arg("input_norms").none(),
           arg("frequencies").none(), arg("slot_positions").none());
}

}  // namespace kvloom
