#include "weight.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "int4_group.h"
#include "isa.h"

namespace kvloom {

namespace {

void slices(Product product, int k, int* num_slices, int* slice_elements) {
  const int most = kTileSliceBytes / activation_bytes(product), per = weight_per(product);
  *num_slices = (k + most - 1) / most;
  const int rows = (k + per - 1) / per;
  *slice_elements = (rows + *num_slices - 1) / *num_slices * per;
}

}  // namespace

PackedWeight weight_shape(Product product, int n, int k, bool gated) {
  PackedWeight w;
  w.product = product;
  w.n = n;
  w.k = k;
  w.gated = gated;
  w.num_panels = gated ? (n / 2 + 15) / 16 : (n + kPanelColumns - 1) / kPanelColumns;
  slices(product, k, &w.num_slices, &w.slice_elements);
  return w;
}

std::size_t weight_data_bytes(const PackedWeight& weight) {
  return static_cast<std::size_t>(weight.num_panels) * weight.panel_bytes();
}

int weight_source_row(const PackedWeight& w, int p, int c) {
  if (!w.gated) {
    int row = p * kPanelColumns + c;
    return row < w.n ? row : -1;
  }
  int j = p * 16 + c % 16;
  return j < w.n / 2 ? (c < 16 ? j : w.n / 2 + j) : -1;
}

void pack_weight(PackedWeight& w, Element element, const void* source, const float* source_scale) {
  const Kernels& kernel = kernels();
  const std::size_t row_bytes = static_cast<std::size_t>(panel_row_bytes(w.product)), k = static_cast<std::size_t>(w.k);
  const std::size_t per = static_cast<std::size_t>(weight_per(w.product)), bytes = row_bytes / kPanelColumns / per;
  ThreadPool::instance().run([&](Team& team) {
    std::vector<float> row(k);
    std::vector<uint16_t> rounded(k);
    for (int p; (p = team.next()) < w.num_panels;) {
      char* panel = w.data + static_cast<std::size_t>(p) * w.panel_bytes();
      std::memset(panel, 0, w.panel_bytes());
      for (int c = 0; c < kPanelColumns; ++c) {
        const int from = weight_source_row(w, p, c);
        const std::size_t at = static_cast<std::size_t>(p) * kPanelColumns + c;
        if (w.scale) w.scale[at] = 0;
        if (w.row_sum) w.row_sum[at] = 0;
        if (from < 0) continue;
        // Element i of a row lies at row i / per, column c, place i % per.
        char* out = panel + static_cast<std::size_t>(c) * per * bytes;
        const std::size_t stride = row_bytes;
        if (element == Element::kInt8) {
          const int8_t* codes = static_cast<const int8_t*>(source) + from * k;
          int sum = 0;
          for (std::size_t i = 0; i < k; ++i) {
            out[i / per * stride + i % per] = codes[i];
            sum += codes[i];
          }
          w.scale[at] = source_scale[from];
          if (w.row_sum) w.row_sum[at] = static_cast<float>(sum);
          continue;
        }
        const std::size_t size = element == Element::kFloat ? 4 : 2;
        kernel.to_float(element, static_cast<const char*>(source) + from * k * size, row.data(), k);
        if (is_int4(w.product)) {
          for (std::size_t i = 0; i < k; i += kInt4Group)
            pack_int4_group(row.data() + i, static_cast<int>(k - i < kInt4Group ? k - i : kInt4Group),
                            panel + i / kInt4Group * row_bytes, c);
        } else if (w.product == Product::kFloat) {
          for (std::size_t i = 0; i < k; ++i) std::memcpy(out + i * stride, &row[i], 4);
        } else if (w.product == Product::kHalf) {
          kernel.from_float(Element::kHalf, row.data(), rounded.data(), k);
          for (std::size_t i = 0; i < k; ++i) std::memcpy(out + i * stride, &rounded[i], 2);
        } else if (w.product == Product::kBf16) {
          kernel.from_float(Element::kBf16, row.data(), rounded.data(), k);
          for (std::size_t i = 0; i < k; ++i) std::memcpy(out + i / 2 * stride + i % 2 * 2, &rounded[i], 2);
        } else {
          float peak = 0;
          for (float x : row) peak = std::fabs(x) > peak ? std::fabs(x) : peak;
          const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
          int sum = 0;
          for (std::size_t i = 0; i < k; ++i) {
            const int code = static_cast<int>(std::nearbyint(row[i] * inverse));
            out[i / per * stride + i % per] = static_cast<char>(code);
            sum += code;
          }
          w.scale[at] = peak / 127.0f;
          if (w.row_sum) w.row_sum[at] = static_cast<float>(sum);
        }
      }
    }
  });
}

void pack_mxfp4(PackedWeight& w, const uint8_t* codes, const uint8_t* exponents) {
  const std::size_t groups = static_cast<std::size_t>(w.k / kInt4Group);
  ThreadPool::instance().run([&](Team& team) {
    for (int p; (p = team.next()) < w.num_panels;) {
      char* panel = w.data + static_cast<std::size_t>(p) * w.panel_bytes();
      std::memset(panel, 0, w.panel_bytes());
      for (int c = 0; c < kPanelColumns; ++c) {
        const int from = weight_source_row(w, p, c);
        if (from < 0) continue;
        for (std::size_t g = 0; g < groups; ++g) {
          const std::size_t at = static_cast<std::size_t>(from) * groups + g;
          char* row = panel + g * kMxfp4RowBytes;
          row[kInt4CodeBytes + c] = static_cast<char>(exponents[at]);
          for (int u = 0; u < kInt4Group / 8; ++u) {
            uint32_t word = 0;
            for (int i = 0; i < 8; ++i) {
              const uint32_t pair = codes[at * 16 + static_cast<std::size_t>(u * 4 + i / 2)];
              word |= (pair >> 4 * (i % 2) & 15u) << int4_shift(i);
            }
            std::memcpy(row + (u * kPanelColumns + c) * 4, &word, 4);
          }
        }
      }
    }
  });
}

namespace {

void unpack_mxfp4_group(const char* row, int column, float* out) {
  static constexpr float kMagnitude[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  const int exponent = static_cast<uint8_t>(row[kInt4CodeBytes + column]) - 127;
  for (int i = 0; i < kInt4Group; ++i) {
    uint32_t word;
    std::memcpy(&word, row + (i / 8 * kPanelColumns + column) * 4, 4);
    const uint32_t code = word >> int4_shift(i) & 15u;
    out[i] = std::ldexp(code & 8u ? -kMagnitude[code & 7u] : kMagnitude[code & 7u], exponent);
  }
}

}  // namespace

void unpack_row(const PackedWeight& w, int row, float* out) {
  const Kernels& kernel = kernels();
  const std::size_t stride = static_cast<std::size_t>(panel_row_bytes(w.product));
  const char* panel = w.data + static_cast<std::size_t>(row / kPanelColumns) * w.panel_bytes();
  if (is_mxfp4(w.product)) {
    for (int i = 0; i < w.k; i += kInt4Group)
      unpack_mxfp4_group(panel + static_cast<std::size_t>(i / kInt4Group) * stride, row % kPanelColumns, out + i);
    return;
  }
  if (is_int4(w.product)) {
    for (int i = 0; i < w.k; i += kInt4Group)
      unpack_int4_group(panel + static_cast<std::size_t>(i / kInt4Group) * stride, row % kPanelColumns,
                        w.k - i < kInt4Group ? w.k - i : kInt4Group, out + i);
    return;
  }
  const int per = weight_per(w.product), bytes = static_cast<int>(stride) / kPanelColumns / per;
  const char* at = panel + static_cast<std::size_t>(row % kPanelColumns) * per * bytes;
  const int groups = (w.k + per - 1) / per;
  char unit[4];
  float value[4];
  for (int i = 0; i < groups; ++i) {
    std::memcpy(unit, at + i * stride, static_cast<std::size_t>(per) * bytes);
    if (bytes == 1)
      for (int j = 0; j < per; ++j) value[j] = static_cast<float>(static_cast<int8_t>(unit[j])) * w.scale[row];
    else
      kernel.to_float(bytes == 4 ? Element::kFloat : w.product == Product::kHalf ? Element::kHalf : Element::kBf16, unit,
                      value, static_cast<std::size_t>(per));
    for (int j = 0; j < per && i * per + j < w.k; ++j) out[i * per + j] = value[j];
  }
}

Tiles tiles_shape(Product product, int num_rows, int k) {
  Tiles tiles;
  tiles.product = product;
  tiles.num_rows = num_rows;
  tiles.k = k;
  const int count = (num_rows + kTileRows - 1) / kTileRows;
  tiles.tile_rows = (num_rows + count - 1) / count;
  slices(product, k, &tiles.num_slices, &tiles.slice_elements);
  return tiles;
}

void linear(Team& team, const LinearArgs& args) {
  const Kernels& kernel = kernels();
  const int panels = args.weight->num_panels, tiles = args.x->num_tiles();
  // Sums of groups of activations. Each thread computes them, which is cheaper than a barrier.
  const std::size_t sums_per_tile = is_int4(args.weight->product) ? args.weight->panel_rows() * kTileRows : 0;
  float* sums = nullptr;
  auto sum_up = [&](int tile_begin, int tile_end) {
    if (!sums_per_tile) return;
    sums = reinterpret_cast<float*>(team.scratch(static_cast<std::size_t>(tile_end - tile_begin) * sums_per_tile * 4));
    kernel.group_sums(*args.x, tile_begin, tile_end, sums);
  };
  if (tiles <= 6) {  // bound by the weight's bytes: long contiguous streams
    int begin, end;
    team.share(panels, &begin, &end);
    if (begin == end) return;
    sum_up(0, tiles);
    kernel.linear(args, begin, end, 0, tiles, sums);
    return;
  }
  // Bound by arithmetic: blocks of rows that stay in the second-level cache during the loop over panels.
  const std::size_t tile_bytes = args.x->tile_bytes();
  int per_block = static_cast<int>((400u << 10) / tile_bytes);
  per_block = per_block < 6 ? 6 : per_block > 32 ? 32 : per_block;
  const int blocks = (tiles + per_block - 1) / per_block;
  per_block = (tiles + blocks - 1) / blocks;
  const int chunk = panels / (team.size() * 4) > 8 ? 8 : panels / (team.size() * 4) < 1 ? 1 : panels / (team.size() * 4);
  const int chunks = (panels + chunk - 1) / chunk;
  int summed = -1;  // the block whose sums are computed
  for (int task; (task = team.next()) < blocks * chunks;) {
    const int block = task / chunks, first = task % chunks * chunk;
    const int last = first + chunk < panels ? first + chunk : panels;
    const int end = (block + 1) * per_block < tiles ? (block + 1) * per_block : tiles;
    if (block != summed) sum_up(block * per_block, end);
    summed = block;
    kernel.linear(args, first, last, block * per_block, end, sums);
  }
}

}  // namespace kvloom
