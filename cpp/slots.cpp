#include "slots.h"

#include <cstring>

#include "isa.h"

namespace kvloom {

namespace {

// How the elements of one slot lie: `k` units of `per` elements, then single elements of V.
struct Layout {
  int per, bytes;
  std::size_t k_unit, k_stride, v_stride;  // bytes
  explicit Layout(const Slots& s) {
    per = s.store == Element::kBf16 ? 2 : s.store == Element::kInt8 ? 4 : 1;
    bytes = s.store == Element::kFloat ? 4 : s.store == Element::kInt8 ? 1 : 2;
    k_unit = static_cast<std::size_t>(per) * bytes;
    k_stride = k_unit * s.block_size;
    v_stride = k_unit;
  }
  std::size_t k_at(int within) const { return within * k_unit; }
  std::size_t v_at(const Slots& s, int within) const {
    return static_cast<std::size_t>(s.block_size) * s.k_width * bytes +
           static_cast<std::size_t>(within / per) * s.v_width * k_unit + static_cast<std::size_t>(within % per) * bytes;
  }
  std::size_t scale_at(const Slots& s, int within, bool value) const {
    return static_cast<std::size_t>(s.block_size) * (s.k_width + s.v_width) +
           (static_cast<std::size_t>(value ? s.block_size : 0) + within) * 4;
  }
};

char* block(const Slots& s, int32_t address) { return s.arena + static_cast<std::size_t>(static_cast<uint32_t>(address)) * 128; }

template <std::size_t Bytes>
void copy_strided(char* to, const char* from, std::size_t stride, int n) {
  for (int i = 0; i < n; ++i) std::memcpy(to + i * stride, from + i * stride, Bytes);
}

void copy_elements(std::size_t bytes, char* to, const char* from, std::size_t stride, int n) {
  if (bytes == 4) return copy_strided<4>(to, from, stride, n);
  if (bytes == 2) return copy_strided<2>(to, from, stride, n);
  copy_strided<1>(to, from, stride, n);
}

}  // namespace

void write_slots(const Slots& s, const int32_t* address, const int32_t* within, int n, Element element, const void* k,
                 const void* v) {
  const Kernels& kernel = kernels();
  const std::size_t size = element == Element::kFloat ? 4 : 2;
  ThreadPool::instance().run([&](Team& team) {
    int begin, end;
    team.share(n, &begin, &end);
    float key[1024], value[1024];
    for (int i = begin; i < end; ++i) {
      const std::size_t row = static_cast<std::size_t>(i);
      kernel.to_float(element, static_cast<const char*>(k) + row * s.k_width * size, key, s.k_width);
      kernel.to_float(element, static_cast<const char*>(v) + row * s.v_width * size, value, s.v_width);
      Lane lane = {};
      lane.columns = address + i;
      lane.arena = s.arena;
      lane.block_size = s.block_size;
      lane.block_inverse = block_inverse_of(s.block_size);
      lane.k_width = s.k_width;
      lane.v_width = s.v_width;
      lane.store = s.store;
      kernel.write_slot(lane, within[i], key, value);
    }
  });
}

void read_slots(const Slots& s, const int32_t* address, const int32_t* within, int n, Element element, void* k, void* v) {
  const Kernels& kernel = kernels();
  const Layout layout(s);
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
        if (side) {
          const char* from = at + layout.v_at(s, within[i]);
          for (int d = 0; d < width; ++d) std::memcpy(raw + d * layout.bytes, from + d * layout.v_stride, layout.bytes);
        } else {
          const char* from = at + layout.k_at(within[i]);
          for (int d = 0; d < width / layout.per; ++d)
            std::memcpy(raw + d * layout.k_unit, from + d * layout.k_stride, layout.k_unit);
        }
        if (s.store == Element::kInt8) {
          float scale;
          std::memcpy(&scale, at + layout.scale_at(s, within[i], side), 4);
          for (int d = 0; d < width; ++d) wide[d] = static_cast<float>(static_cast<int8_t>(raw[d])) * scale;
        } else {
          kernel.to_float(s.store, raw, wide, width);
        }
        char* out = static_cast<char*>(side ? v : k) + static_cast<std::size_t>(i) * width * size;
        kernel.from_float(element, wide, out, width);
      }
    }
  });
}

void copy_slots(const Slots& s, const int32_t* from, const int32_t* from_within, const int32_t* to,
                const int32_t* to_within, const int32_t* start, int num_runs) {
  const Layout layout(s);
  ThreadPool::instance().run([&](Team& team) {
    for (int r; (r = team.next()) < num_runs;)
      for (int i = start[r]; i < start[r + 1]; ++i) {
        const char* source = block(s, from[i]);
        char* target = block(s, to[i]);
        if (source == target && from_within[i] == to_within[i]) continue;
        // K strides by blocks of equal size; only the places within differ.
        copy_elements(layout.k_unit, target + layout.k_at(to_within[i]), source + layout.k_at(from_within[i]),
                      layout.k_stride, s.k_width / layout.per);
        copy_elements(static_cast<std::size_t>(layout.bytes), target + layout.v_at(s, to_within[i]),
                      source + layout.v_at(s, from_within[i]), layout.v_stride, s.v_width);
        if (s.store == Element::kInt8)
          for (bool value : {false, true})
            std::memcpy(target + layout.scale_at(s, to_within[i], value),
                        source + layout.scale_at(s, from_within[i], value), 4);
      }
  });
}

}  // namespace kvloom
