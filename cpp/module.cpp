// The Python interface: it takes pointers and arrays, without torch. The Python package checks shapes and dtypes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <stdexcept>

#include "decoder.h"
#include "isa.h"
#include "module_arrays.h"
#include "slots.h"

namespace nb = nanobind;

namespace kvloom {
void bind_decoder(nb::module_& m);
void bind_experts(nb::module_& m);

namespace {

using Released = nb::call_guard<nb::gil_scoped_release>;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Bytes per second at which all threads together read [address, address + bytes).
double read_bandwidth(std::uintptr_t address, std::size_t bytes) {
  const Kernels& kernel = kernels();
  std::vector<double> sums;
  release_openmp_threads();
  const auto start = std::chrono::steady_clock::now();
  ThreadPool::instance().run(
      [&](Team& team) {
        const std::size_t id = static_cast<std::size_t>(team.id());
        const std::size_t share = bytes / static_cast<std::size_t>(team.size()) / 256 * 256;
        sums[id] = kernel.read_probe(reinterpret_cast<const char*>(address) + share * id, share);
      },
      [&](int num_threads) { sums.resize(static_cast<std::size_t>(num_threads)); });
  return static_cast<double>(bytes) / seconds_since(start);
}

double peak_flops(int product, long iterations) {
  const Kernels& kernel = kernels();
  std::vector<double> done;
  release_openmp_threads();
  const auto start = std::chrono::steady_clock::now();
  ThreadPool::instance().run(
      [&](Team& team) {
        done[static_cast<std::size_t>(team.id())] = kernel.flop_probe(static_cast<Product>(product), iterations);
      },
      [&](int num_threads) { done.resize(static_cast<std::size_t>(num_threads)); });
  const double elapsed = seconds_since(start);
  double total = 0;
  for (double x : done) total += x;
  return total / elapsed;
}

void linear_op(const PackedWeightObject& weight, std::uintptr_t x, int x_element, int num_rows, std::ptrdiff_t x_stride,
               std::uintptr_t y, int y_element, std::ptrdiff_t y_stride, int finish, int activation) {
  const Kernels& kernel = kernels();
  static thread_local std::vector<char> data;
  static thread_local std::vector<float> scale;
  if (num_rows == 0) return;
  const PackedWeight& w = weight.weight;
  Tiles tiles = tiles_shape(w.product, num_rows, w.k);
  if (data.size() < tiles.bytes() + 64) data.resize(tiles.bytes() + 64);
  if (scale.size() < static_cast<std::size_t>(num_rows)) scale.resize(static_cast<std::size_t>(num_rows));
  tiles.data = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(data.data()) + 63) & ~std::uintptr_t{63});
  tiles.scale = scale.data();
  const std::size_t size = x_element == 0 ? 4 : 2;
  ThreadPool::instance().run([&](Team& team) {
    int begin, end;
    team.share(num_rows, &begin, &end);
    float* row = reinterpret_cast<float*>(team.scratch(static_cast<std::size_t>(w.k) * 4 + 64));
    for (int t = begin; t < end; ++t) {
      kernel.to_float(static_cast<Element>(x_element), reinterpret_cast<const char*>(x) + t * x_stride * size, row,
                      static_cast<std::size_t>(w.k));
      kernel.pack_row(tiles, t, row);
    }
    team.barrier();
    linear(team, {&w, &tiles, static_cast<Finish>(finish), static_cast<Element>(y_element),
                  static_cast<Activation>(activation), reinterpret_cast<void*>(y), static_cast<std::size_t>(y_stride),
                  nullptr});
  });
}

void attention_op(const LanesObject& lanes, const IntVector& cu_seqlens, const IntVector& seq_rows, const ShapeTuple& shape,
                  bool low, float scale, float softcap, std::uintptr_t sinks, std::uintptr_t slopes, int q_element,
                  std::uintptr_t q, std::ptrdiff_t q_stride, int out_element, std::uintptr_t out,
                  std::ptrdiff_t out_stride, std::uintptr_t lse, std::uintptr_t bias, std::ptrdiff_t bias_seq_stride,
                  std::ptrdiff_t bias_lane_stride) {
  static thread_local Workspace own;
  Workspace& workspace = own;  // workers must use the caller's instance
  AttentionCall call;
  call.lanes = lanes.table;
  call.batch = batch_of(lanes, cu_seqlens, seq_rows);
  call.shape = shape_of(lanes, shape);
  check_slots(lanes, call.batch, call.shape);
  call.compute = low ? Element::kBf16 : Element::kFloat;
  call.scale = scale;
  call.softcap = softcap;
  call.sinks = reinterpret_cast<const float*>(sinks);
  call.slopes = reinterpret_cast<const float*>(slopes);
  call.bias = reinterpret_cast<const float*>(bias);
  call.bias_seq_stride = bias_seq_stride;
  call.bias_lane_stride = bias_lane_stride;
  call.q_element = static_cast<Element>(q_element);
  call.q = reinterpret_cast<const void*>(q);
  call.q_stride = q_stride;
  call.out_element = static_cast<Element>(out_element);
  call.out = reinterpret_cast<void*>(out);
  call.out_stride = out_stride;
  call.lse = reinterpret_cast<float*>(lse);
  ThreadPool::instance().run([&](Team& team) { attention(team, call, workspace); });
}

void key_mass_op(const LanesObject& lanes, const IntVector& cu_seqlens, const IntVector& seq_rows, const ShapeTuple& shape,
                 bool low, float scale, float softcap, int q_element, std::uintptr_t q, std::ptrdiff_t q_stride,
                 std::uintptr_t lse, std::uintptr_t mass, std::ptrdiff_t num_slots) {
  AttentionCall call;
  call.lanes = lanes.table;
  call.batch = batch_of(lanes, cu_seqlens, seq_rows);
  call.shape = shape_of(lanes, shape);
  check_slots(lanes, call.batch, call.shape);
  call.compute = low ? Element::kBf16 : Element::kFloat;
  call.scale = scale;
  call.softcap = softcap;
  call.q_element = static_cast<Element>(q_element);
  call.q = reinterpret_cast<const void*>(q);
  call.q_stride = q_stride;
  ThreadPool::instance().run([&](Team& team) {
    key_mass(team, call, reinterpret_cast<const float*>(lse), reinterpret_cast<float*>(mass), num_slots);
  });
}

void append_op(const LanesObject& lanes, const IntVector& cu_seqlens, const IntVector& seq_rows, const ShapeTuple& shape,
               int element, std::uintptr_t q, std::ptrdiff_t q_stride, std::uintptr_t k, std::ptrdiff_t k_stride,
               std::uintptr_t v, std::ptrdiff_t v_stride, std::uintptr_t cos_sin, int rotary, std::uintptr_t q_norm,
               std::uintptr_t k_norm, float eps) {
  AppendCall call;
  call.lanes = lanes.table;
  call.batch = batch_of(lanes, cu_seqlens, seq_rows);
  call.shape = shape_of(lanes, shape);
  check_slots(lanes, call.batch, call.shape);
  call.element = static_cast<Element>(element);
  call.q = reinterpret_cast<void*>(q);
  call.k = reinterpret_cast<void*>(k);
  call.v = reinterpret_cast<const void*>(v);
  call.q_stride = q_stride;
  call.k_stride = k_stride;
  call.v_stride = v_stride;
  call.cos_sin = reinterpret_cast<const float*>(cos_sin);
  call.rotary = rotary;
  call.q_norm = {reinterpret_cast<const float*>(q_norm), nullptr, false, eps};
  call.k_norm = {reinterpret_cast<const float*>(k_norm), nullptr, false, eps};
  ThreadPool::instance().run([&](Team& team) { append(team, call); });
}

// Rows of floats or 16-bit numbers through one of the row kernels, shared by the team.
template <class F> void over_rows(int num_rows, F function) {
  ThreadPool::instance().run([&](Team& team) {
    int begin, end;
    team.share(num_rows, &begin, &end);
    for (int t = begin; t < end; ++t) function(team, t);
  });
}

void rms_norm_op(std::uintptr_t x, std::uintptr_t residual, std::uintptr_t weight, std::uintptr_t out, int element,
                 int num_rows, int width, float eps) {
  const Kernels& kernel = kernels();
  const std::size_t bytes = static_cast<std::size_t>(width) * (element == 0 ? 4 : 2);
  const Element e = static_cast<Element>(element);
  over_rows(num_rows, [&](Team& team, int t) {
    float* row = reinterpret_cast<float*>(team.scratch(static_cast<std::size_t>(width) * 8 + 128));
    float* other = row + (width + 15) / 16 * 16;
    kernel.to_float(e, reinterpret_cast<const char*>(x) + t * bytes, row, width);
    if (residual) {  // residual += x, and the sum is normed
      kernel.to_float(e, reinterpret_cast<const char*>(residual) + t * bytes, other, width);
      kernel.add(row, other, width);
      kernel.from_float(e, row, reinterpret_cast<char*>(residual) + t * bytes, width);
      kernel.to_float(e, reinterpret_cast<const char*>(residual) + t * bytes, row, width);
    }
    kernel.rms_norm(row, reinterpret_cast<const float*>(weight), width, eps, row);
    kernel.from_float(e, row, reinterpret_cast<char*>(out) + t * bytes, width);
  });
}

void layer_norm_op(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t out, int num_rows,
                   int width, float eps) {
  const Kernels& kernel = kernels();
  const Norm norm = {reinterpret_cast<const float*>(weight), reinterpret_cast<const float*>(bias), true, eps};
  over_rows(num_rows, [&](Team&, int t) {
    const std::size_t at = static_cast<std::size_t>(t) * width;
    normalise(kernel, norm, reinterpret_cast<const float*>(x) + at, width, reinterpret_cast<float*>(out) + at);
  });
}

void gate_op(std::uintptr_t gate, std::uintptr_t up, std::uintptr_t out, int element, int num_rows, int width,
             int activation) {
  const Kernels& kernel = kernels();
  const std::size_t bytes = static_cast<std::size_t>(width) * (element == 0 ? 4 : 2);
  const Element e = static_cast<Element>(element);
  over_rows(num_rows, [&](Team& team, int t) {
    float* row = reinterpret_cast<float*>(team.scratch(static_cast<std::size_t>(width) * 8 + 128));
    float* other = row + (width + 15) / 16 * 16;
    kernel.to_float(e, reinterpret_cast<const char*>(gate) + t * bytes, row, width);
    kernel.to_float(e, reinterpret_cast<const char*>(up) + t * bytes, other, width);
    kernel.gate(static_cast<Activation>(activation), row, other, width, row);
    kernel.from_float(e, row, reinterpret_cast<char*>(out) + t * bytes, width);
  });
}

void argmax_op(std::uintptr_t x, int num_rows, int width, std::uintptr_t out) {
  const Kernels& kernel = kernels();
  over_rows(num_rows, [&](Team&, int t) {
    reinterpret_cast<int32_t*>(out)[t] =
        kernel.argmax(reinterpret_cast<const float*>(x) + static_cast<std::size_t>(t) * width, width);
  });
}

Slots slots_of(std::uintptr_t arena, int store, int block_size, int k_width, int v_width) {
  return {reinterpret_cast<char*>(arena), static_cast<Store>(store), block_size, k_width, v_width};
}

}  // namespace
}  // namespace kvloom

NB_MODULE(_ext, m) {
  using namespace kvloom;
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("available_isas", &available_isas);
  m.def("force_isa", &force_isa);
  nb::dict stores;
  for (const NamedStore& each : kStores) stores[each.name] = static_cast<int>(each.store);
  m.attr("stores") = stores;
  m.def("exact_in_bf16", [](int store) { return exact_in_bf16(static_cast<Store>(store)); });
  m.def("num_threads", [] { return ThreadPool::instance().size(); });
  m.def("set_num_threads", [](int n) { ThreadPool::instance().resize(n); }, Released());
  m.def("quota_threads", &quota_threads);
  nb::class_<TeamSize>(m, "TeamSize").def(nb::init<int>()).def("next", &TeamSize::next).def("record", &TeamSize::record);
  m.def("read_bandwidth", &read_bandwidth, Released());
  m.def("peak_flops", &peak_flops, Released());

  nb::class_<PackedWeightObject>(m, "PackedWeight")
      .def(nb::init<std::uintptr_t, int, int, int, int, bool, std::uintptr_t, std::uintptr_t>())
      .def_prop_ro("num_bytes", [](const PackedWeightObject& w) { return w.num_bytes; })
      .def_prop_ro("address", [](const PackedWeightObject& w) { return reinterpret_cast<std::uintptr_t>(w.weight.data); })
      .def_prop_ro("shape", [](const PackedWeightObject& w) { return nb::make_tuple(w.weight.n, w.weight.k); })
      .def("read_row", [](const PackedWeightObject& w, int row, std::uintptr_t out) {
        if (row < 0 || row >= w.weight.n) throw std::invalid_argument("row outside the weight");
        unpack_row(w.weight, row, reinterpret_cast<float*>(out));
      });
  m.def("linear", &linear_op, Released());

  nb::class_<LanesObject>(m, "Lanes")
      .def(nb::init<std::uintptr_t, std::size_t, IntCube, IntMatrix, IntMatrix, int, int>())
      .def("set_segments", &LanesObject::set_segments);
  m.def("append", &append_op, Released());
  m.def("attention", &attention_op, Released());
  m.def("key_mass", &key_mass_op, Released());

  m.def("rms_norm", &rms_norm_op, Released());
  m.def("layer_norm", &layer_norm_op, Released());
  m.def("gate", &gate_op, Released());
  m.def("argmax", &argmax_op, Released());

  m.def("write_slots", [](std::uintptr_t arena, int store, int block_size, int k_width, int v_width, const IntVector& address,
                          const IntVector& within, int element, std::uintptr_t k, std::uintptr_t v) {
    nb::gil_scoped_release release;
    write_slots(slots_of(arena, store, block_size, k_width, v_width), address.data(), within.data(),
                static_cast<int>(address.shape(0)), static_cast<Element>(element), reinterpret_cast<const void*>(k),
                reinterpret_cast<const void*>(v));
  });
  m.def("read_slots", [](std::uintptr_t arena, int store, int block_size, int k_width, int v_width, const IntVector& address,
                         const IntVector& within, int element, std::uintptr_t k, std::uintptr_t v) {
    nb::gil_scoped_release release;
    read_slots(slots_of(arena, store, block_size, k_width, v_width), address.data(), within.data(),
               static_cast<int>(address.shape(0)), static_cast<Element>(element), reinterpret_cast<void*>(k),
               reinterpret_cast<void*>(v));
  });
  m.def("copy_slots", [](std::uintptr_t arena, int store, int block_size, int k_width, int v_width, const IntVector& from,
                         const IntVector& from_within, const IntVector& to, const IntVector& to_within,
                         const IntVector& start) {
    nb::gil_scoped_release release;
    copy_slots(slots_of(arena, store, block_size, k_width, v_width), from.data(), from_within.data(), to.data(),
               to_within.data(), start.data(), static_cast<int>(start.shape(0)) - 1);
  });
  m.def("encode_blocks", [](std::uintptr_t arena, int store, int to_store, int block_size, int k_width, int v_width,
                            const IntVector& from, const IntVector& to) {
    nb::gil_scoped_release release;
    encode_blocks(slots_of(arena, store, block_size, k_width, v_width), static_cast<Store>(to_store), from.data(),
                  to.data(), static_cast<int>(from.shape(0)));
  });
  bind_experts(m);
  bind_decoder(m);
}
