// A mixture of experts owned by Python, with the weights that it points to.
#pragma once

#include <vector>

#include "experts.h"
#include "module_arrays.h"

namespace kvloom {

class ExpertsObject {
 public:
  // `experts` are pairs of (gate_up, down), `shared` is one or None. `routing` is (per_token, sigmoid, normalise, scale,
  // groups, kept_groups, group_best, jitter, scale_input).
  ExpertsObject(nb::object router, nb::list experts, nb::object shared,
                const std::tuple<int, bool, bool, float, int, int, int, float, bool>& routing,
                const FloatVector* selection_bias,
                int activation, float alpha, float limit);

  const ExpertsLayer& layer() const { return layer_; }
  // out [T, hidden] += the mixture of x [T, hidden].
  void add(std::uintptr_t x, int num_tokens, std::uintptr_t out);
  std::uint64_t read_bytes() const { return memory_.read_bytes; }
  std::uint64_t experts_read() const { return memory_.experts_read; }

 private:
  const PackedWeight* weight(const nb::handle& object);
  Expert expert(const nb::handle& pair);

  ExpertsLayer layer_;
  ExpertsMemory memory_;
  std::vector<float> selection_bias_;
  std::vector<nb::object> owners_;
};

}  // namespace kvloom
