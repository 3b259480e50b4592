#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>

#include "isa.h"
#include "step_memory.h"

namespace kvloom {

namespace {

constexpr int kFewTokens = 16;  // chosen and grouped by one thread: cheaper than a barrier

template <class Buffer> void reserve(Buffer& buffer, std::size_t n) {
  if (buffer.size() < n) {
    buffer.clear();  // nothing is kept between calls: no copy
    buffer.resize(n);
  }
}

char* aligned(ExpertsMemory::Buffer<char>& buffer) {
  return reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(buffer.data()) + 63) & ~std::uintptr_t{63});
}

Tiles tiles_in(Product product, int rows, int k, ExpertsMemory::Buffer<char>& data, ExpertsMemory::Buffer<float>& scale) {
  Tiles tiles = tiles_shape(product, rows, k);
  reserve(data, tiles.bytes() + 64);
  reserve(scale, static_cast<std::size_t>(rows));
  tiles.data = aligned(data);
  tiles.scale = scale.data();
  return tiles;
}

// Tiles of one product and width, one after the other in a buffer that is allocated once all are known.
class TileRun {
 public:
  Tiles add(Product product, int rows, int k) {
    Tiles tiles = tiles_shape(product, rows, k);
    tiles.data = reinterpret_cast<char*>(bytes_);  // an offset until `place`
    bytes_ += tiles.bytes();
    return tiles;
  }
  void reserve_in(ExpertsMemory::Buffer<char>& buffer) {
    reserve(buffer, bytes_ + 64);
    base_ = aligned(buffer);
  }
  void place(Tiles& tiles, float* scale) const {
    tiles.data = base_ + reinterpret_cast<std::uintptr_t>(tiles.data);
    tiles.scale = scale;
  }

 private:
  std::size_t bytes_ = 0;
  char* base_ = nullptr;
};

std::size_t expert_bytes(const Expert& expert) {
  return weight_data_bytes(*expert.gate_up) + weight_data_bytes(*expert.down);
}

void copy_row(const Tiles& from, int t, const Tiles& to, int u) {
  const std::size_t bytes = static_cast<std::size_t>(from.slice_elements) * activation_bytes(from.product);
  for (int s = 0; s < from.num_slices; ++s) std::memcpy(to.row(u, s), from.row(t, s), bytes);
  if (from.product == Product::kInt8Int8) to.scale[u] = from.scale[t];
}

// Multiply row t by `by`.
void scale_row(const Kernels& kernel, const Tiles& tiles, int t, float by) {
  if (tiles.product == Product::kInt8Int8) {
    tiles.scale[t] *= by;
    return;
  }
  const Element element = activation_bytes(tiles.product) == 4 ? Element::kFloat : Element::kBf16;
  for (int s = 0; s < tiles.num_slices; ++s)
    kernel.scaled(element, tiles.row(t, s), by, element, tiles.row(t, s), static_cast<std::size_t>(tiles.slice_elements));
}

// Tiles of a block that stays in the second-level cache during the loop over panels.
int tiles_per_block(const Tiles& tiles) {
  const int count = tiles.num_tiles();
  const int most = std::clamp(static_cast<int>((400u << 10) / tiles.tile_bytes()), 6, 32);
  const int blocks = (count + most - 1) / most;
  return (count + blocks - 1) / blocks;
}

class Mixture {
 public:
  Mixture(Team& team, const ExpertsLayer& layer, int num_tokens, float* y, std::ptrdiff_t y_stride, ExpertsMemory& memory)
      : team_(team), layer_(layer), memory_(memory), kernel_(kernels()), num_tokens_(num_tokens),
        per_token_(layer.routing.per_token), y_(y), y_stride_(y_stride) {}

  void run(const std::function<const float*(int, float*)>& row) {
    if (team_.id() == 0) reserve_rows();
    team_.barrier();
    Tiles rows = tiles_shape(product(), num_tokens_, layer_.hidden());
    rows.data = aligned(memory_.row_tiles);
    rows.scale = memory_.row_scale.data();
    route(row, rows);
    if (num_tokens_ > kFewTokens) {
      int begin, end;
      team_.share(num_tokens_, &begin, &end);
      choose(begin, end);
      team_.barrier();
    }
    if (team_.id() == 0) {
      if (num_tokens_ <= kFewTokens) choose(0, num_tokens_);
      group(rows);
      plan();
    }
    team_.barrier();
    if (num_tokens_ > 1 || layer_.routing.scale_input) {
      gather(rows);
      team_.barrier();
    }
    gate();
    team_.barrier();
    add_down();
    team_.barrier();
  }

 private:
  Product product() const { return layer_.experts.front().gate_up->product; }
  int count() const { return static_cast<int>(layer_.experts.size()); }

  void reserve_rows() {
    const std::size_t tokens = static_cast<std::size_t>(num_tokens_);
    tiles_in(product(), num_tokens_, layer_.hidden(), memory_.row_tiles, memory_.row_scale);
    tiles_in(Product::kFloat, num_tokens_, layer_.hidden(), memory_.router_tiles, memory_.router_scale);
    reserve(memory_.logits, tokens * static_cast<std::size_t>(layer_.router->n));
    reserve(memory_.share_of, tokens * static_cast<std::size_t>(per_token_));
    memory_.chosen.resize(tokens * static_cast<std::size_t>(per_token_));
  }

  void route(const std::function<const float*(int, float*)>& row, const Tiles& rows) {
    Tiles exact = tiles_shape(Product::kFloat, num_tokens_, layer_.hidden());
    exact.data = aligned(memory_.router_tiles);
    exact.scale = memory_.router_scale.data();
    int begin, end;
    team_.share(num_tokens_, &begin, &end);
    float* scratch = reinterpret_cast<float*>(team_.scratch(static_cast<std::size_t>(layer_.hidden()) * 4 + 64));
    for (int t = begin; t < end; ++t) {
      const float* from = row(t, scratch);
      kernel_.pack_row(rows, t, from);
      kernel_.pack_row(exact, t, from);
    }
    team_.barrier();
    linear(team_, {layer_.router, &exact, Finish::kStore, Element::kFloat, Activation::kSilu, memory_.logits.data(),
                   static_cast<std::size_t>(layer_.router->n), nullptr});
    team_.barrier();
  }

  void choose(int begin, int end) {
    for (int t = begin; t < end; ++t) {
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * per_token_;
      choose_experts(layer_.routing, memory_.logits.data() + static_cast<std::ptrdiff_t>(t) * layer_.router->n, count(),
                     memory_.chosen.data() + at, memory_.share_of.data() + at);
    }
  }

  // List the tokens of each chosen expert in ascending order, and allocate their tiles.
  void group(const Tiles& rows) {
    const int entries = num_tokens_ * (per_token_ + (layer_.shared.down ? 1 : 0));
    memory_.token.resize(static_cast<std::size_t>(entries));
    reserve(memory_.share, static_cast<std::size_t>(entries));
    reserve(memory_.group_scale, static_cast<std::size_t>(entries));
    reserve(memory_.inner_scale, static_cast<std::size_t>(entries));
    std::vector<int> held(static_cast<std::size_t>(count()), 0), next;
    for (const int32_t e : memory_.chosen) ++held[static_cast<std::size_t>(e)];
    memory_.groups.clear();
    TileRun in, inner;
    int first = 0, widest = 0;
    auto add = [&](const Expert& expert, int tokens) {
      const bool scaled = layer_.routing.scale_input && &expert != &layer_.shared;
      Tiles own = rows;  // every token, in order
      if (tokens < num_tokens_ || scaled) own = in.add(product(), tokens, layer_.hidden());
      memory_.groups.push_back({&expert, first, own, inner.add(expert.down->product, tokens, expert.down->k), scaled});
      first += tokens;
      widest = std::max(widest, expert.down->k);
      memory_.read_bytes += expert_bytes(expert);
    };
    for (int e = 0; e < count(); ++e) {
      next.push_back(first);
      const int tokens = held[static_cast<std::size_t>(e)];
      if (tokens == 0) continue;
      add(layer_.experts[static_cast<std::size_t>(e)], tokens);
      ++memory_.experts_read;
    }
    for (int t = 0; t < num_tokens_; ++t)
      for (int i = 0; i < per_token_; ++i) {
        const std::size_t from = static_cast<std::size_t>(t * per_token_ + i);
        const std::size_t at = static_cast<std::size_t>(next[static_cast<std::size_t>(memory_.chosen[from])]++);
        memory_.token[at] = t;
        memory_.share[at] = memory_.share_of[from];
      }
    if (layer_.shared.down) {
      for (int t = 0; t < num_tokens_; ++t) {
        const std::size_t at = static_cast<std::size_t>(first + t);
        const float* logits = memory_.logits.data() + static_cast<std::ptrdiff_t>(t) * layer_.router->n;
        memory_.token[at] = t;
        memory_.share[at] = layer_.shared_gate() ? 1 / (1 + std::exp(-logits[count()])) : 1.0f;
      }
      add(layer_.shared, num_tokens_);
    }
    in.reserve_in(memory_.group_tiles);
    inner.reserve_in(memory_.inner_tiles);
    for (ExpertsMemory::Group& group : memory_.groups) {
      if (group.inner.num_rows < num_tokens_ || group.scaled) in.place(group.in, memory_.group_scale.data() + group.first);
      inner.place(group.inner, memory_.inner_scale.data() + group.first);
      if (num_tokens_ == 1) clear_padding(group.inner, 0, 1);
    }
    if (layer_.experts.front().down->product == Product::kInt8Int8)
      reserve(memory_.wide, static_cast<std::size_t>(first) * static_cast<std::size_t>(widest));
  }

  // Cut gate and up of all groups into tasks of about equal work.
  void plan() {
    memory_.tasks.clear();
    long work = 0;
    for (const ExpertsMemory::Group& group : memory_.groups)
      work += static_cast<long>(group.in.num_tiles()) * group.expert->gate_up->num_panels;
    const long each = std::max(1L, work / (team_.size() * 8));
    for (std::size_t g = 0; g < memory_.groups.size(); ++g) {
      const ExpertsMemory::Group& group = memory_.groups[g];
      const int tiles = group.in.num_tiles(), block = tiles_per_block(group.in);
      const int panels = group.expert->gate_up->num_panels;
      const int chunk = std::clamp(static_cast<int>(each / block), 1, panels);
      for (int tile = 0; tile < tiles; tile += block)
        for (int panel = 0; panel < panels; panel += chunk)
          memory_.tasks.push_back({static_cast<int>(g), panel, std::min(panel + chunk, panels), tile,
                                   std::min(tile + block, tiles)});
    }
  }

  template <class Function> void over_entries(Function function) {
    int begin, end;
    const ExpertsMemory::Group& last = memory_.groups.back();
    team_.share(last.first + last.inner.num_rows, &begin, &end);
    for (const ExpertsMemory::Group& group : memory_.groups)
      for (int i = std::max(begin - group.first, 0); i < std::min(end - group.first, group.inner.num_rows); ++i)
        function(group, i);
  }

  void gather(const Tiles& rows) {
    over_entries([&](const ExpertsMemory::Group& group, int i) {
      const std::size_t at = static_cast<std::size_t>(group.first + i);
      if (group.in.data != rows.data) copy_row(rows, memory_.token[at], group.in, i);
      if (group.scaled) {
        scale_row(kernel_, group.in, i, memory_.share[at]);
        memory_.share[at] = 1;
      }
      clear_padding(group.inner, i, i + 1);
    });
  }

  // Sums of groups of activations, which int4 needs. Each thread computes them, which is cheaper than a barrier.
  const float* sums(const PackedWeight& weight, const Tiles& tiles, int tile_begin, int tile_end) {
    if (!is_int4(weight.product)) return nullptr;
    const std::size_t floats = static_cast<std::size_t>(tile_end - tile_begin) * weight.panel_rows() * kTileRows;
    float* out = reinterpret_cast<float*>(team_.scratch(floats * 4));
    kernel_.group_sums(tiles, tile_begin, tile_end, out);
    return out;
  }

  void gate() {
    const bool quantised = layer_.experts.front().down->product == Product::kInt8Int8;
    for (int i; (i = team_.next()) < static_cast<int>(memory_.tasks.size());) {
      const ExpertsMemory::Task& task = memory_.tasks[static_cast<std::size_t>(i)];
      const ExpertsMemory::Group& group = memory_.groups[static_cast<std::size_t>(task.group)];
      const PackedWeight& weight = *group.expert->gate_up;
      LinearArgs args = {&weight, &group.in, quantised ? Finish::kGate : Finish::kGateTiles, Element::kFloat,
                         layer_.activation, nullptr, static_cast<std::size_t>(wide_stride()),
                         &group.inner};
      if (quantised) args.y = memory_.wide.data() + static_cast<std::ptrdiff_t>(group.first) * wide_stride();
      args.alpha = layer_.alpha;
      args.limit = layer_.limit;
      kernel_.linear(args, task.panel_begin, task.panel_end, task.tile_begin, task.tile_end,
                     sums(weight, group.in, task.tile_begin, task.tile_end));
    }
    if (!quantised) return;
    team_.barrier();
    over_entries([&](const ExpertsMemory::Group& group, int i) {
      kernel_.pack_row(group.inner, i, memory_.wide.data() + static_cast<std::ptrdiff_t>(group.first + i) * wide_stride());
    });
  }

  int wide_stride() const {
    int widest = 0;
    for (const ExpertsMemory::Group& group : memory_.groups) widest = std::max(widest, group.inner.k);
    return widest;
  }

  // Columns of the result by threads, experts in order.
  void add_down() {
    const int panels = layer_.experts.front().down->num_panels;
    const int chunk = std::clamp(panels / (team_.size() * 4), 1, panels);
    for (int i; (i = team_.next()) * chunk < panels;) {
      const int begin = i * chunk, end = std::min(begin + chunk, panels);
      for (const ExpertsMemory::Group& group : memory_.groups) {
        const PackedWeight& weight = *group.expert->down;
        LinearArgs args = {&weight, &group.inner, Finish::kAddTo, Element::kFloat, Activation::kSilu, y_,
                           static_cast<std::size_t>(y_stride_), nullptr};
        args.to = memory_.token.data() + group.first;
        args.by = memory_.share.data() + group.first;
        const int tiles = group.inner.num_tiles(), block = tiles_per_block(group.inner);
        for (int tile = 0; tile < tiles; tile += block) {
          const int last = std::min(tile + block, tiles);
          kernel_.linear(args, begin, end, tile, last, sums(weight, group.inner, tile, last));
        }
      }
    }
  }

  Team& team_;
  const ExpertsLayer& layer_;
  ExpertsMemory& memory_;
  const Kernels& kernel_;
  const int num_tokens_, per_token_;
  float* y_;
  const std::ptrdiff_t y_stride_;
};

// Expert i is the highest logit m that is left; its multiplier is its softmax over those left whose distance from m is at
// most 2 jitter max(|logit|, m).
void choose_sparsely(const Router& router, const float* logits, int num_experts, int32_t* chosen, float* share) {
  std::vector<bool> taken(static_cast<std::size_t>(num_experts), false);
  std::vector<std::pair<int32_t, float>> found;
  for (int i = 0; i < router.per_token; ++i) {
    int best = -1;
    for (int e = 0; e < num_experts; ++e)
      if (!taken[static_cast<std::size_t>(e)] && (best < 0 || logits[e] > logits[best])) best = e;
    const float peak = logits[best];
    float total = 0;
    for (int e = 0; e < num_experts; ++e) {
      const float factor = std::max(std::abs(logits[e]), peak);
      if (!taken[static_cast<std::size_t>(e)] && !((peak - logits[e]) / factor > 2 * router.jitter))
        total += std::exp(logits[e] - peak);
    }
    taken[static_cast<std::size_t>(best)] = true;
    found.emplace_back(best, 1 / total);
  }
  std::sort(found.begin(), found.end());
  for (std::size_t i = 0; i < found.size(); ++i) {
    chosen[i] = found[i].first;
    share[i] = found[i].second * router.scale;
  }
}

}  // namespace

void choose_experts(const Router& router, const float* logits, int num_experts, int32_t* chosen, float* share) {
  if (router.jitter > 0) return choose_sparsely(router, logits, num_experts, chosen, share);
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  thread_local std::vector<float> score, choice, best;
  const std::size_t count = static_cast<std::size_t>(num_experts);
  score.resize(count);
  choice.resize(count);
  if (router.sigmoid) {
    for (std::size_t e = 0; e < count; ++e) score[e] = 1 / (1 + std::exp(-logits[e]));
  } else {
    const float peak = *std::max_element(logits, logits + count);
    float total = 0;
    for (std::size_t e = 0; e < count; ++e) total += score[e] = std::exp(logits[e] - peak);
    for (float& s : score) s /= total;
  }
  for (std::size_t e = 0; e < count; ++e) choice[e] = score[e] + (router.selection_bias ? router.selection_bias[e] : 0);
  if (router.kept_groups < router.groups) {
    const std::size_t size = count / static_cast<std::size_t>(router.groups);
    std::vector<std::pair<float, int>> order;
    for (int g = 0; g < router.groups; ++g) {
      best.assign(choice.begin() + static_cast<std::ptrdiff_t>(g * size),
                  choice.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
      const int counted = std::min(router.group_best, static_cast<int>(size));
      std::partial_sort(best.begin(), best.begin() + counted, best.end(), std::greater<float>());
      float total = 0;
      for (int i = 0; i < counted; ++i) total += best[static_cast<std::size_t>(i)];
      order.emplace_back(-total, g);
    }
    std::sort(order.begin(), order.end());
    for (std::size_t i = static_cast<std::size_t>(router.kept_groups); i < order.size(); ++i)
      for (std::size_t e = 0; e < size; ++e) choice[static_cast<std::size_t>(order[i].second) * size + e] = kNever;
  }
  for (int i = 0; i < router.per_token; ++i) {  // the best, first of equals, k times
    const std::ptrdiff_t e = std::max_element(choice.begin(), choice.end()) - choice.begin();
    chosen[i] = static_cast<int32_t>(e);
    choice[static_cast<std::size_t>(e)] = kNever;
  }
  std::sort(chosen, chosen + router.per_token);
  float total = 0;
  for (int i = 0; i < router.per_token; ++i) total += share[i] = score[static_cast<std::size_t>(chosen[i])];
  for (int i = 0; i < router.per_token; ++i) share[i] = (router.normalise ? share[i] / (total + 1e-20f) : share[i]) * router.scale;
}

void experts(Team& team, const ExpertsLayer& layer, int num_tokens,
             const std::function<const float*(int, float*)>& row, float* y, std::ptrdiff_t y_stride,
             ExpertsMemory& memory) {
  if (num_tokens == 0) return;
  Mixture(team, layer, num_tokens, y, y_stride, memory).run(row);
}

}  // namespace kvloom
