// Python's view of the decoder: built layer by layer, then stepped.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <deque>

#include "decoder.h"
#include "module_arrays.h"
#include "step_stretches.h"

namespace nb = nanobind;

namespace kvloom {

namespace {

using FloatMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatCube = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using IntOut = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void expect(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

class DecoderObject {
 public:
  DecoderObject(int hidden, int vocab, float eps, float embedding_scale, float logit_softcap, bool low, nb::object embedding,
                nb::object output, const FloatVector& final_norm) {
    model_.hidden = hidden;
    model_.vocab = vocab;
    model_.eps = eps;
    model_.embedding_scale = embedding_scale;
    model_.logit_softcap = logit_softcap;
    model_.dtype = low ? Element::kBf16 : Element::kFloat;
    model_.embedding = weight(embedding, vocab, hidden, false);
    model_.output = weight(output, vocab, hidden, false);
    model_.final_norm = vector(final_norm, hidden);
  }

  int add_rope(const FloatVector& inverse_frequency, float amplitude) {
    Rope rope;
    rope.inverse_frequency.assign(inverse_frequency.data(), inverse_frequency.data() + inverse_frequency.shape(0));
    rope.amplitude = amplitude;
    model_.ropes.push_back(rope);
    return static_cast<int>(model_.ropes.size()) - 1;
  }

  void add_layer(const ShapeTuple& shape, nb::object qkv, nb::object o, nb::object gate_up, nb::object down,
                 const FloatVector& attention_norm, const FloatVector& mlp_norm,
                 std::optional<FloatVector> post_attention_norm, std::optional<FloatVector> post_mlp_norm,
                 std::optional<FloatVector> q_norm, std::optional<FloatVector> k_norm, std::optional<FloatVector> sinks,
                 std::optional<FloatVector> slopes, int rope, float scale, float softcap, int activation) {
    DecoderLayer layer;
    LayerShape& s = layer.shape;
    std::tie(s.num_heads, s.num_kv_heads, s.k_width, s.v_width, s.lane_offset, s.window) = shape;
    expect(s.num_kv_heads > 0 && s.num_heads % s.num_kv_heads == 0, "query heads must be a multiple of KV heads");
    expect(rope < static_cast<int>(model_.ropes.size()), "the layer names a rope that was not added");
    expect(rope < 0 || 2 * static_cast<int>(model_.ropes[static_cast<std::size_t>(rope)].inverse_frequency.size()) <= s.k_width,
           "the rotary width exceeds the key width");
    layer.qkv = weight(qkv, (s.num_heads + s.num_kv_heads) * s.k_width + s.num_kv_heads * s.v_width, model_.hidden, false);
    layer.o = weight(o, model_.hidden, s.num_heads * s.v_width, false);
    layer.gate_up = weight(gate_up, -1, model_.hidden, true);
    layer.down = weight(down, model_.hidden, layer.gate_up->n / 2, false);
    if (!model_.layers.empty()) {
      const DecoderLayer& first = model_.layers.front();
      expect(layer.o->k == first.o->k && layer.down->k == first.down->k && layer.o->product == first.o->product &&
                 layer.down->product == first.down->product && layer.qkv->product == first.qkv->product,
             "all layers must have equal widths and products");
    }
    expect(layer.qkv->product == layer.gate_up->product, "qkv and gate_up must use one product");
    layer.attention_norm = vector(attention_norm, model_.hidden);
    layer.mlp_norm = vector(mlp_norm, model_.hidden);
    if (post_attention_norm) layer.post_attention_norm = vector(*post_attention_norm, model_.hidden);
    if (post_mlp_norm) layer.post_mlp_norm = vector(*post_mlp_norm, model_.hidden);
    if (q_norm) layer.q_norm = vector(*q_norm, s.k_width);
    if (k_norm) layer.k_norm = vector(*k_norm, s.k_width);
    if (sinks) layer.sinks = vector(*sinks, s.num_heads);
    if (slopes) layer.slopes = vector(*slopes, s.num_heads);
    layer.rope = rope;
    layer.scale = scale;
    layer.softcap = softcap;
    layer.activation = static_cast<Activation>(activation);
    model_.layers.push_back(layer);
  }

  void prepare(int num_tokens) {
    expect(!model_.layers.empty() && num_tokens > 0, "a step has layers and tokens");
    nb::gil_scoped_release release;
    prepare_steps(model_, num_tokens, memory_);
  }

  void step(const LanesObject& lanes, const IntVector& ids, const IntVector& positions, const IntVector& cu_seqlens,
            const IntVector& seq_rows, const IntVector& logit_rows, std::optional<FloatMatrix> logits,
            std::optional<IntOut> greedy, std::optional<FloatMatrix> hidden, std::optional<IntVector> query_rows,
            std::optional<FloatCube> queries, std::optional<FloatCube> lse, std::optional<FloatCube> bias) {
    StepCall call;
    call.lanes = lanes.table;
    call.batch = batch_of(lanes, cu_seqlens, seq_rows);
    const int tokens = call.batch.num_tokens;
    expect(!model_.layers.empty(), "the decoder has no layers");
    expect(static_cast<int>(ids.shape(0)) == tokens && static_cast<int>(positions.shape(0)) == tokens,
           "ids and positions must have cu_seqlens[-1] entries");
    for (int t = 0; t < tokens; ++t)
      expect(ids.data()[t] >= 0 && ids.data()[t] < model_.vocab, "a token id lies outside the vocabulary");
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
    nb::gil_scoped_release release;
    decoder_step(model_, call, memory_);
  }

 private:
  const PackedWeight* weight(const nb::object& object, int n, int k, bool gated) {
    const PackedWeight& w = nb::cast<PackedWeightObject&>(object).weight;
    expect((n < 0 || w.n == n) && w.k == k && w.gated == gated, "a weight does not have the shape that its place asks for");
    owners_.push_back(object);
    return &w;
  }
  const float* vector(const FloatVector& source, int n) {
    expect(static_cast<int>(source.shape(0)) == n, "a norm, sink or slope vector has the wrong length");
    vectors_.emplace_back(source.data(), source.data() + n);
    return vectors_.back().data();
  }

  DecoderModel model_;
  StepMemory memory_;
  std::deque<std::vector<float>> vectors_;
  std::vector<nb::object> owners_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
  using nb::arg;
  m.attr("LONGEST_STRETCH") = Stretches::kUncut;
  nb::class_<DecoderObject>(m, "Decoder")
      .def(nb::init<int, int, float, float, float, bool, nb::object, nb::object, const FloatVector&>())
      .def("add_rope", &DecoderObject::add_rope)
      .def("add_layer", &DecoderObject::add_layer, arg("shape"), arg("qkv"), arg("o"), arg("gate_up"), arg("down"),
           arg("attention_norm"), arg("mlp_norm"), arg("post_attention_norm").none(), arg("post_mlp_norm").none(),
           arg("q_norm").none(), arg("k_norm").none(), arg("sinks").none(), arg("slopes").none(), arg("rope"), arg("scale"),
           arg("softcap"), arg("activation"))
      .def("prepare", &DecoderObject::prepare, arg("num_tokens"))
      .def("step", &DecoderObject::step, arg("lanes"), arg("ids"), arg("positions"), arg("cu_seqlens"), arg("seq_rows"),
           arg("logit_rows"), arg("logits").none(), arg("greedy").none(), arg("hidden").none(), arg("query_rows").none(),
           arg("queries").none(), arg("lse").none(), arg("bias").none());
}

}  // namespace kvloom
