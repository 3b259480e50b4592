#include "module_experts.h"

#include <nanobind/stl/optional.h>

namespace nb = nanobind;

namespace kvloom {

namespace {

void expect(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

const PackedWeight* ExpertsObject::weight(const nb::handle& object) {
  owners_.push_back(nb::borrow(object));
  return &nb::cast<PackedWeightObject&>(object).weight;
}

Expert ExpertsObject::expert(const nb::handle& pair) {
  const nb::tuple both = nb::cast<nb::tuple>(pair);
  expect(both.size() == 2, "an expert is a pair of weights");
  const Expert found = {weight(both[0]), weight(both[1])};
  const Product product = layer_.experts.empty() ? found.gate_up->product : layer_.experts.front().gate_up->product;
  expect(found.gate_up->gated && !found.down->gated, "of an expert only gate and up are gated");
  expect(found.gate_up->k == layer_.hidden() && found.down->n == layer_.hidden() && 2 * found.down->k == found.gate_up->n,
         "an expert's weights must be [2 intermediate, hidden] and [hidden, intermediate]");
  expect(found.gate_up->product == product && found.down->product == product, "all experts must use one product");
  return found;
}

ExpertsObject::ExpertsObject(nb::object router, nb::list experts, nb::object shared,
                             const std::tuple<int, bool, bool, float, int, int, int, float, bool>& routing,
                             const FloatVector* selection_bias, int activation, float alpha, float limit) {
  layer_.router = weight(router);
  for (const nb::handle pair : experts) layer_.experts.push_back(expert(pair));
  const int count = static_cast<int>(layer_.experts.size());
  expect(count > 0, "a mixture has experts");
  for (const Expert& each : layer_.experts)
    expect(each.down->k == layer_.experts.front().down->k, "all routed experts must have one width");
  if (!shared.is_none()) layer_.shared = expert(shared);
  expect(layer_.router->product == Product::kFloat && !layer_.router->gated, "the router is a plain weight in float32");
  expect(layer_.router->n == count || (layer_.router->n == count + 1 && layer_.shared.down),
         "the router must have a row for each expert, and one more for the gate of a shared one");
  Router& r = layer_.routing;
  std::tie(r.per_token, r.sigmoid, r.normalise, r.scale, r.groups, r.kept_groups, r.group_best, r.jitter,
           r.scale_input) = routing;
  expect(r.groups > 0 && count % r.groups == 0 && r.kept_groups > 0 && r.kept_groups <= r.groups && r.group_best > 0,
         "experts must divide into groups, of which some are kept");
  expect(r.per_token > 0 && r.per_token <= count / r.groups * r.kept_groups, "a token must find as many experts as it takes");
  if (selection_bias) {
    expect(static_cast<int>(selection_bias->shape(0)) == count, "the selection bias must have a number for each expert");
    selection_bias_.assign(selection_bias->data(), selection_bias->data() + count);
    r.selection_bias = selection_bias_.data();
  }
  layer_.activation = static_cast<Activation>(activation);
  layer_.alpha = alpha;
  layer_.limit = limit;
}

void ExpertsObject::add(std::uintptr_t x, int num_tokens, std::uintptr_t out) {
  const std::ptrdiff_t width = layer_.hidden();
  const float* rows = reinterpret_cast<const float*>(x);
  release_openmp_threads();
  ThreadPool::instance().run([&](Team& team) {
    experts(team, layer_, num_tokens, [&](int t, float*) { return rows + t * width; }, reinterpret_cast<float*>(out), width,
            memory_);
  });
}

void bind_experts(nb::module_& m) {
  using Routing = std::tuple<int, bool, bool, float, int, int, int, float, bool>;
  nb::class_<ExpertsObject>(m, "Experts")
      .def("__init__",
           [](ExpertsObject* self, nb::object router, nb::list experts, nb::object shared, const Routing& routing,
              std::optional<FloatVector> selection_bias, int activation, float alpha, float limit) {
             new (self) ExpertsObject(router, experts, shared, routing, selection_bias ? &*selection_bias : nullptr, activation,
                                      alpha, limit);
           },
           nb::arg("router"), nb::arg("experts"), nb::arg("shared").none(), nb::arg("routing"),
           nb::arg("selection_bias").none(), nb::arg("activation"), nb::arg("alpha"), nb::arg("limit"))
      .def("add", &ExpertsObject::add, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("read_bytes", &ExpertsObject::read_bytes)
      .def_prop_ro("experts_read", &ExpertsObject::experts_read);
}

}  // namespace kvloom
