#include "step_memory.h"

#include <algorithm>
#include <cstring>

namespace kvloom {

namespace {

template <class Buffer> void reserve_in(Buffer& buffer, std::size_t n) {
  if (buffer.size() < n) {
    buffer.clear();  // nothing is kept between steps: no copy
    buffer.resize(n);
  }
}

char* aligned(char* p) {
  return reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(p) + 63) & ~std::uintptr_t{63});
}

}  // namespace

void StepMemory::Inputs::reserve(Product product, int rows, int k) {
  reserve_in(data, tiles_shape(product, rows, k).bytes() + 64);
  reserve_in(scale, static_cast<std::size_t>(rows));
}

Tiles StepMemory::Inputs::tiles(Product product, int longest, int rows, int k) {
  Tiles tiles = tiles_shape(product, longest, k);
  tiles.num_rows = rows;
  tiles.data = aligned(data.data());
  tiles.scale = scale.data();
  return tiles;
}

void StepMemory::reserve(const DecoderModel& model, int num_tokens, int longest, int num_output_rows, int num_logits,
                         int num_threads) {
  const std::size_t hidden = static_cast<std::size_t>(model.hidden), rows = static_cast<std::size_t>(longest);
  const std::size_t threads = static_cast<std::size_t>(num_threads);
  own_tiles.resize(std::max(own_tiles.size(), threads));
  own_row.resize(std::max(own_row.size(), threads));
  reserve_in(own_scale, threads * 16);
  for (auto& row : own_row) reserve_in(row, hidden);
  std::size_t heads = 0, floats = 0, rotary = 0;
  bool normed_branch = false;
  for (const Part& part : model.parts) {
    switch (part.kind) {
      case PartKind::kNorm:
        normal.reserve(part.reader->product, longest, model.hidden);
        for (auto& tile : own_tiles) reserve_in(tile, tiles_shape(part.reader->product, 1, model.hidden).bytes() + 64);
        break;
      case PartKind::kHeads: heads = std::max(heads, static_cast<std::size_t>(part.weight->n)); break;
      case PartKind::kAppend: break;
      case PartKind::kAttend:
      case PartKind::kUp:
        (part.kind == PartKind::kUp ? inner : attended).reserve(part.reader->product, longest, part.reader->k);
        if (part.reader->product == Product::kInt8Int8) floats = std::max(floats, static_cast<std::size_t>(part.reader->k));
        break;
      case PartKind::kAdd:
      case PartKind::kExperts: normed_branch |= static_cast<bool>(part.norm); break;
    }
  }
  for (const Rope& rope : model.ropes) rotary += 2 * rope.inverse_frequency.size();
  reserve_in(x, static_cast<std::size_t>(num_tokens) * hidden);
  reserve_in(qkv, rows * heads);
  reserve_in(branch, normed_branch ? rows * hidden : 0);
  reserve_in(wide, rows * floats);
  reserve_in(cos_sin, static_cast<std::size_t>(num_tokens) * rotary);
  reserve_in(logits, static_cast<std::size_t>(num_logits) * static_cast<std::size_t>(model.vocab));
  if (num_output_rows) output.reserve(model.output->product, num_output_rows, model.hidden);
}

Tiles StepMemory::own(int thread, Product product, int k) {
  const std::size_t id = static_cast<std::size_t>(thread);
  Tiles tiles = tiles_shape(product, 1, k);
  tiles.data = aligned(own_tiles[id].data());
  tiles.scale = own_scale.data() + id * 16;
  return tiles;
}

void StepMemory::make_pages() {
  for (auto* buffer : {&x, &qkv, &branch, &wide, &cos_sin}) kvloom::make_pages(*buffer);
  for (Inputs* inputs : {&normal, &attended, &inner}) kvloom::make_pages(inputs->data);
}

void clear_padding(const Tiles& tiles, int begin, int end) {
  if (tiles.num_slices * tiles.slice_elements == tiles.k) return;
  const int bytes = activation_bytes(tiles.product);
  for (int s = 0; s < tiles.num_slices; ++s) {
    const int used = std::clamp(tiles.k - s * tiles.slice_elements, 0, tiles.slice_elements);
    if (used == tiles.slice_elements) continue;
    for (int t = begin; t < end; ++t)
      std::memset(tiles.row(t, s) + used * bytes, 0, static_cast<std::size_t>(tiles.slice_elements - used) * bytes);
  }
}

}  // namespace kvloom
