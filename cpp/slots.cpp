#include "slots.h"

#include <cstring>

#include "isa.h"

namespace kvloom {

namespace {

BlockLayout layout_of(const Slots& s) { return {s.store, s.block_size, block_width(s.k_width), block_width(s.v_width)}; }

char* block(const Slots& s, int32_t address) { return s.arena + static_cast<std::size_t>(static_cast<uint32_t>(address)) * 128; }

template <std::size_t Bytes>
void copy_strided(char* to, std::size_t to_stride, const char* from, std::size_t from_stride, int n) {
  for (int i = 0; i < n; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, Bytes);
}

void copy_elements(std::size_t bytes, char* to, std::size_t to_stride, const char* from, std::size_t from_stride, int n) {
  if (bytes == 4) return copy_strided<4>(to, to_stride, from, from_stride, n);
  if (bytes == 2) return copy_strided<2>(to, to_stride, from, from_stride, n);
  copy_strided<1>(to, to_stride, from, from_stride, n);
}

}  // namespace

void write_slots(const Slots& s, const int32_t* address, const int32_t* within, int n, Element element, const void* k,
                 const void* v) {
  const Kernels& kernel = kernels();
  const std::size_t size = element == Element::kFloat ? 4 : 2;
  ThreadPool::instance().run([&](Team& team) {
    int begin, end;
    team.share(n, &begin, &end);
    float key[1024] = {}, value[1024] = {};  // zeros behind a head
    for (int i = begin; i < end; ++i) {
      const std::size_t row = static_cast<std::size_t>(i);
      kernel.to_float(element, static_cast<const char*>(k) + row * s.k_width * size, key, s.k_width);
      kernel.to_float(element, static_cast<const char*>(v) + row * s.v_width * size, value, s.v_width);
      Lane lane = {};
      lane.columns = address + i;
      lane.arena = s.arena;
      lane.block_size = s.block_size;
      lane.block_inverse = block_inverse_of(s.block_size);
      lane.k_width = block_width(s.k_width);
      lane.v_width = block_width(s.v_width);
      lane.store = s.store;
      kernel.write_slot(lane, within[i], key, value);
    }
  });
}

void read_slots(const Slots& s, const int32_t* address, const int32_t* within, int n, Element element, void* k, void* v) {
  const Kernels& kernel = kernels();
  const BlockLayout layout = layout_of(s);
  const std::size_t size = element == Element::kFloat ? 4 : 2;
  ThreadPool::instance().run([&](Team& team) {
    int begin, end;
    team.share(n, &begin, &end);
    char raw[4096];
    float wide[1024];
    for (int i = begin; i < end; ++i) {
      const char* at = block(s, address[i]);
      for (int side = 0; side < 2; ++side) {
        const int width = side ? s.v_width : s.k_width;
        if (width == 0) continue;
        const Side& of = side ? layout.v : layout.k;
        const char* from = at + (side ? layout.value(within[i]) : layout.key(within[i]));
        const int unit = side ? 1 : of.per;  // elements side by side
        copy_elements(static_cast<std::size_t>(unit * of.bytes), raw, static_cast<std::size_t>(unit * of.bytes), from,
                      side ? layout.v_unit() : layout.k_row(), block_width(width) / unit);
        kernel.to_float(of.element, raw, wide, width);
        if (of.scaled) {
          float scale;
          std::memcpy(&scale, at + (side ? layout.v_scale(within[i]) : layout.k_scale(within[i])), 4);
          for (int d = 0; d < width; ++d) wide[d] *= scale;
        }
        char* out = static_cast<char*>(side ? v : k) + static_cast<std::size_t>(i) * width * size;
        kernel.from_float(element, wide, out, width);
      }
    }
  });
}

void copy_slots(const Slots& s, const int32_t* from, const int32_t* from_within, const int32_t* to,
                const int32_t* to_within, const int32_t* start, int num_runs) {
  const BlockLayout layout = layout_of(s);
  ThreadPool::instance().run([&](Team& team) {
    for (int r; (r = team.next()) < num_runs;)
      for (int i = start[r]; i < start[r + 1]; ++i) {
        const char* source = block(s, from[i]);
        char* target = block(s, to[i]);
        if (source == target && from_within[i] == to_within[i]) continue;
        // Rows are as far apart in both; only the places within them differ.
        copy_elements(layout.k_unit(), target + layout.key(to_within[i]), layout.k_row(),
                      source + layout.key(from_within[i]), layout.k_row(), layout.k_width / layout.k.per);
        copy_elements(static_cast<std::size_t>(layout.v.bytes), target + layout.value(to_within[i]), layout.v_unit(),
                      source + layout.value(from_within[i]), layout.v_unit(), layout.v_width);
        if (layout.k.scaled) std::memcpy(target + layout.k_scale(to_within[i]), source + layout.k_scale(from_within[i]), 4);
        if (layout.v.scaled) std::memcpy(target + layout.v_scale(to_within[i]), source + layout.v_scale(from_within[i]), 4);
      }
  });
}

void encode_blocks(const Slots& s, Store to_store, const int32_t* from, const int32_t* to, int n) {
  const Kernels& kernel = kernels();
  ThreadPool::instance().run([&](Team& team) {
    int begin, end;
    team.share(n, &begin, &end);
    char* scratch = team.scratch(kKernelScratchBytes);
    for (int i = begin; i < end; ++i)
      kernel.encode_block({s.store, to_store, s.block_size, block_width(s.k_width), block_width(s.v_width),
                           block(s, from[i]), block(s, to[i])}, scratch);
  });
}

}  // namespace kvloom
