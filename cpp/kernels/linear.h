// Linear layers over packed weights: y[t, n] = sum_k x[t, k] w[n, k] (+ bias), finished while the sums are in cache.
#pragma once

#include "kernels.h"
#include "tile.h"
#include "tile_int4.h"

namespace KVLOOM_ISA {

using namespace kvloom;

static inline vf activate(Activation activation, vf g) {
  if (activation == Activation::kSilu)
    return vdiv(g, vadd(vset(1.0f), vexp2(vmin(vmul(g, vset(-1.4426950409f)), vset(126.0f)))));
  if (activation == Activation::kGelu) {
    // max(g, 0) - |g| / 2 erfc(|g| / sqrt(2)), erfc by Abramowitz and Stegun 7.1.26 (error below 1.5e-7)
    const vf size = vabs(g), z = vmul(size, vset(0.70710678119f));
    const vf t = vdiv(vset(1.0f), vfma(z, vset(0.3275911f), vset(1.0f)));
    vf p = vfma(t, vset(1.061405429f), vset(-1.453152027f));
    p = vfma(t, p, vset(1.421413741f));
    p = vfma(t, p, vset(-0.284496736f));
    p = vmul(t, vfma(t, p, vset(0.254829592f)));
    const vf power = vexp2(vmax(vmul(vmul(z, z), vset(-1.4426950409f)), vset(-126.0f)));
    return vsub(vmax(g, vzero()), vmul(vmul(size, vset(0.5f)), vmul(p, power)));
  }
  if (activation == Activation::kRelu2) {
    const vf positive = vmax(g, vzero());
    return vmul(positive, positive);
  }
  // GELU by tanh: g / 2 (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))
  vf cubic = vmul(vmul(g, g), g);
  vf t = vtanh(vmul(vset(0.7978845608f), vfma(cubic, vset(0.044715f), g)));
  return vmul(vmul(g, vset(0.5f)), vadd(t, vset(1.0f)));
}

// The inside of an MLP without a gate.
static inline vf activated(const LinearArgs& args, vf x) {
  if (args.activation != Activation::kXielu) return activate(args.activation, x);
  const vf above = vmax(x, vzero()), below = vmin(x, vzero());
  const vf power = vexp2(vmax(vmul(below, vset(1.4426950409f)), vset(-126.0f)));
  const vf curve = vmul(vset(args.limit), vsub(vsub(power, vset(1.0f)), below));
  return vfma(x, vset(args.beta), vfma(vmul(above, above), vset(args.alpha), curve));
}

static inline vf gated(const LinearArgs& args, vf gate, vf up) {
  if (args.activation != Activation::kClampedGate) return vmul(activate(args.activation, gate), up);
  const vf limit = vset(args.limit);
  gate = vmin(gate, limit);
  up = vmax(vmin(up, limit), vset(-args.limit));
  const vf power = vmul(vmul(gate, vset(args.alpha)), vset(-1.4426950409f));
  const vf swish = vdiv(gate, vadd(vset(1.0f), vexp2(vmin(power, vset(126.0f)))));
  return vmul(vadd(up, vset(1.0f)), swish);
}

static void convert_to_float(Element e, const void* x, float* y, size_t n) {
  const uint16_t* h = (const uint16_t*)x;
  size_t i = 0;
  if (e == Element::kFloat) {
    memcpy(y, x, n * 4);
    return;
  }
  if (e == Element::kInt8 || e == Element::kE4m3) {  // values of codes, without their scale
#define KVLOOM_VALUES(Code) \
  for (; i < n; ++i) y[i] = Code::value(((const uint8_t*)x)[i])
    KVLOOM_BY_CODE(e, KVLOOM_VALUES)
#undef KVLOOM_VALUES
    return;
  }
  if (e == Element::kBf16) {
    for (; i + W <= n; i += W) vstore(y + i, vload_bf16(h + i));
    for (; i < n; ++i) y[i] = bf16_float(h[i]);
  } else {
    for (; i + W <= n; i += W) vstore(y + i, vload_half(h + i));
    for (; i < n; ++i) y[i] = half_float(h[i]);
  }
}

static void convert_from_float(Element e, const float* x, void* y, size_t n) {
  uint16_t* h = (uint16_t*)y;
  size_t i = 0;
  if (e == Element::kFloat) {
    memcpy(y, x, n * 4);
    return;
  }
  if (e == Element::kBf16) {
    for (; i + W <= n; i += W) vstore_bf16(h + i, vload(x + i));
    for (; i < n; ++i) h[i] = float_bf16(x[i]);
  } else {
    for (; i + W <= n; i += W) vstore_half(h + i, vload(x + i));
    for (; i < n; ++i) h[i] = float_half(x[i]);
  }
}

// y = x times `by`, from one element to another.
static void convert_scaled(Element from, const void* x, float by, Element to, void* y, size_t n) {
  const vf factor = vset(by);
  size_t i = 0;
  for (; i + W <= n; i += W) {
    vf value = from == Element::kFloat  ? vload((const float*)x + i)
               : from == Element::kBf16 ? vload_bf16((const uint16_t*)x + i)
                                        : vload_half((const uint16_t*)x + i);
    value = vmul(value, factor);
    if (to == Element::kFloat)
      vstore((float*)y + i, value);
    else if (to == Element::kBf16)
      vstore_bf16((uint16_t*)y + i, value);
    else
      vstore_half((uint16_t*)y + i, value);
  }
  if (i == n) return;
  float rest[W];
  const size_t in = from == Element::kFloat ? 4 : 2, out = to == Element::kFloat ? 4 : 2;
  convert_to_float(from, (const char*)x + i * in, rest, n - i);
  for (size_t j = 0; j < n - i; ++j) rest[j] *= by;
  convert_from_float(to, rest, (char*)y + i * out, n - i);
}

static float row_peak(const float* x, int n) {
  vf peak = vzero();
  int i = 0;
  for (; i + W <= n; i += W) peak = vmax(peak, vabs(vload(x + i)));
  float p = vpeak(peak);
  for (; i < n; ++i) p = x[i] > p ? x[i] : -x[i] > p ? -x[i] : p;
  return p;
}

// Write one row of activations into its tile, rounding or quantising; the padding up to whole slices becomes zero.
static void pack_row(const Tiles& tiles, int t, const float* x) {
  float inverse = 0;
  if (tiles.product == Product::kInt8Int8) {
    float peak = row_peak(x, tiles.k);
    tiles.scale[t] = peak / 127.0f;
    inverse = peak > 0 ? 127.0f / peak : 0.0f;
  }
  for (int s = 0; s < tiles.num_slices; ++s) {
    char* row = tiles.row(t, s);
    int begin = s * tiles.slice_elements;
    int n = tiles.k - begin < tiles.slice_elements ? tiles.k - begin : tiles.slice_elements;
    if (n < 0) n = 0;
    int bytes = activation_bytes(tiles.product);
    if (bytes == 4) {
      memcpy(row, x + begin, n * 4);
    } else if (bytes == 2) {
      convert_from_float(Element::kBf16, x + begin, row, n);
    } else {
      for (int i = 0; i < n; ++i)
        row[i] = (char)(uint8_t)(kCodeOffset + (int)__builtin_rintf(x[begin + i] * inverse));
    }
    // Codes of padded weights are zero, so the padding of the activations has no effect; it must be finite.
    memset(row + n * bytes, 0, (size_t)(tiles.slice_elements - n) * bytes);
  }
}

// Finish a tile of sums c[rows, 32] of panel `p` and rows t0 ...
static inline void finish_tile(const LinearArgs& args, int p, int t0, int rows, float* c) {
  const PackedWeight& w = *args.weight;
  const int base = p * kPanelColumns;
  if (w.product == Product::kInt8Int8) {
    for (int m = 0; m < rows; ++m) {
      vf xs = vset(args.x->scale[t0 + m]);
      for (int v = 0; v < kPanelColumns; v += W) {
        vf value = vfromi(vloadi(c + m * kPanelColumns + v));
        value = vfma(vload(w.row_sum + base + v), vset(-128.0f), value);
        vstore(c + m * kPanelColumns + v, vmul(value, vmul(xs, vload(w.scale + base + v))));
      }
    }
  } else if (w.scale) {
    for (int m = 0; m < rows; ++m)
      for (int v = 0; v < kPanelColumns; v += W) {
        float* at = c + m * kPanelColumns + v;
        vstore(at, vmul(vload(at), vload(w.scale + base + v)));
      }
  }
  if (w.bias)
    for (int m = 0; m < rows; ++m)
      for (int v = 0; v < kPanelColumns; v += W) {
        float* at = c + m * kPanelColumns + v;
        vstore(at, vadd(vload(at), vload(w.bias + base + v)));
      }
  const size_t bytes = args.element == Element::kFloat ? 4 : 2;
  if (args.finish == Finish::kStore || args.finish == Finish::kAdd || args.finish == Finish::kAddTo) {
    const int columns = w.n - base < kPanelColumns ? w.n - base : kPanelColumns;
    for (int m = 0; m < rows; ++m) {
      const size_t at = (size_t)(args.to ? args.to[t0 + m] : t0 + m) * args.y_stride + base;
      const float* from = c + m * kPanelColumns;
      if (args.finish == Finish::kAddTo) {
        const float by = args.by[t0 + m];
        float* y = (float*)args.y + at;
        if (columns == kPanelColumns)
          for (int v = 0; v < kPanelColumns; v += W) vstore(y + v, vadd(vload(y + v), vmul(vset(by), vload(from + v))));
        else
          for (int j = 0; j < columns; ++j) y[j] += by * from[j];
      } else if (args.finish == Finish::kAdd) {
        float* y = (float*)args.y + at;
        if (columns == kPanelColumns)
          for (int v = 0; v < kPanelColumns; v += W) vstore(y + v, vadd(vload(y + v), vload(from + v)));
        else
          for (int j = 0; j < columns; ++j) y[j] += from[j];
      } else {
        convert_from_float(args.element, from, (char*)args.y + at * bytes, columns);
      }
    }
    return;
  }
  const int width = w.gated ? 16 : kPanelColumns, outputs = w.gated ? w.n / 2 : w.n;
  const int j0 = p * width, columns = outputs - j0 < width ? outputs - j0 : width;
  for (int m = 0; m < rows; ++m)
    for (int v = 0; v < width; v += W) {
      float* from = c + m * kPanelColumns + v;
      const vf first = vload(from);
      vstore(from, w.gated ? gated(args, first, vload(from + 16)) : activated(args, first));
    }
  if (args.finish == Finish::kGate || args.finish == Finish::kActivate) {
    for (int m = 0; m < rows; ++m)
      convert_from_float(args.element, c + m * kPanelColumns,
                         (char*)args.y + ((size_t)(t0 + m) * args.y_stride + j0) * bytes, columns);
    return;
  }
  const Tiles& out = *args.tiles;
  const int unit = activation_bytes(out.product);
  for (int j = 0, n; j < columns; j += n) {  // a slice border may fall inside a panel
    const int s = (j0 + j) / out.slice_elements, in = (j0 + j) % out.slice_elements;
    n = out.slice_elements - in < columns - j ? out.slice_elements - in : columns - j;
    char* row = out.row(t0, s) + in * unit;
    for (int m = 0; m < rows; ++m, row += kTileRowBytes)
      convert_from_float(unit == 4 ? Element::kFloat : Element::kBf16, c + m * kPanelColumns + j, row, n);
  }
}

// Prefetch the lines that `finish_tile` writes next, and reads if it adds to them: rows are too far apart for the
// hardware prefetcher.
static inline void ask_for_results(const LinearArgs& args, int p, int t0, int rows) {
  const int width = args.weight->gated ? 16 : kPanelColumns, column = p * width;
  char* at;
  size_t stride;
  int bytes;
  if (args.finish == Finish::kGateTiles || args.finish == Finish::kActivateTiles) {
    bytes = activation_bytes(args.tiles->product);
    const int elements = args.tiles->slice_elements;
    at = args.tiles->row(t0, column / elements) + column % elements * bytes;
    stride = kTileRowBytes;
  } else {
    bytes = args.element == Element::kFloat ? 4 : 2;
    at = (char*)args.y + ((size_t)t0 * args.y_stride + column) * bytes;
    stride = args.y_stride * bytes;
  }
  const int last = width * bytes - 1;
  for (int m = 0; m < rows; ++m) {
    char* row = args.to ? (char*)args.y + ((size_t)args.to[t0 + m] * args.y_stride + column) * bytes : at + m * stride;
    for (int i = 0; i <= last; i += 64) prefetch_to_write(row + i);
  }
}

constexpr int kMaxSlices = 64;
constexpr size_t kStreamAhead = 9216;  // bytes between the row in use and the prefetched row, in a single pass

template <class Kind>
static void linear_of(const LinearArgs& args, int panel_begin, int panel_end, int tile_begin, int tile_end) {
  const PackedWeight& w = *args.weight;
  const Tiles& x = *args.x;
  const size_t row_bytes = (size_t)kPanelColumns * Kind::kPer * Kind::kBBytes;
  const int rows_per_slice = w.slice_elements / Kind::kPer;
  const size_t slice_bytes = rows_per_slice * row_bytes, panel_bytes = w.panel_bytes();
  const int tiles = tile_end - tile_begin;
  float c[kTileRows * kPanelColumns] __attribute__((aligned(64)));
  const char* column[2 * kMaxSlices];
  const char* ahead[2 * kMaxSlices];
  // Sums of int8 codes start from what an offset of 128 adds to them, where the codes have none: then all sets agree.
  constexpr bool kFromOffset = Kind::kABytes == 1 && kCodeOffset == 0;
  int32_t start[kPanelColumns];
  for (int p = panel_begin; p < panel_end; ++p) {
    const char* panel = w.data + p * panel_bytes;
    if (kFromOffset)
      for (int j = 0; j < kPanelColumns; ++j) start[j] = 128 * (int32_t)w.row_sum[p * kPanelColumns + j];
    for (int s = 0; s < w.num_slices; ++s) {
      column[2 * s] = panel + s * slice_bytes;
      column[2 * s + 1] = column[2 * s] + row_bytes / 2;
    }
    for (int tile = tile_begin; tile < tile_end; ++tile) {
      int t0 = tile * x.tile_rows;
      int rows = x.num_rows - t0 < x.tile_rows ? x.num_rows - t0 : x.tile_rows;
      Columns b = {column, ahead, w.num_slices, rows_per_slice, row_bytes, row_bytes};
      if (tiles == 1) {
        for (int i = 0; i < 2 * w.num_slices; ++i) ahead[i] = column[i] + kStreamAhead;
      } else {  // the passes over this panel share the work of fetching the next one
        const char* next = panel + panel_bytes + (size_t)(tile - tile_begin) * (panel_bytes / tiles);
        b.ahead_bytes = row_bytes / 2 / tiles;
        for (int s = 0; s < w.num_slices; ++s) {
          ahead[2 * s] = next + (size_t)s * (slice_bytes / tiles);
          ahead[2 * s + 1] = ahead[2 * s] + slice_bytes / tiles / 2;
        }
        if (b.ahead_bytes == 0) b.ahead = nullptr;
      }
      if (tiles > 1) ask_for_results(args, p, t0, rows);
      if (kFromOffset)
        for (int m = 0; m < rows; ++m) memcpy(c + m * kPanelColumns, start, sizeof(start));
      product<Kind, 2>(rows, x.data + tile * x.tile_bytes(), x.slice_bytes(), b, c, kPanelColumns, kFromOffset);
      finish_tile(args, p, t0, rows, c);
    }
  }
}

// A row of a four-bit panel holds its own scales, so that a panel is one stream.
template <class Kind>
static void linear_of_int4(const LinearArgs& args, int panel_begin, int panel_end, int tile_begin, int tile_end,
                           const float* sums) {
  const PackedWeight& w = *args.weight;
  const Tiles& x = *args.x;
  const int groups = (int)w.panel_rows(), tiles = tile_end - tile_begin;
  const size_t panel_bytes = w.panel_bytes();
  float c[kTileRows * kPanelColumns] __attribute__((aligned(64)));
  for (int p = panel_begin; p < panel_end; ++p) {
    const char* panel = w.data + p * panel_bytes;
    for (int tile = tile_begin; tile < tile_end; ++tile) {
      int t0 = tile * x.tile_rows;
      int rows = x.num_rows - t0 < x.tile_rows ? x.num_rows - t0 : x.tile_rows;
      const float* own_sums = Kind::kOffset ? sums + (size_t)(tile - tile_begin) * groups * kTileRows : nullptr;
      Int4Panel b = {panel, own_sums, nullptr, w.num_slices,
                     groups / w.num_slices, 0};
      if (tiles == 1) {
        b.ahead = panel + kStreamAhead;
        b.ahead_bytes = Kind::kRowBytes;
      } else {  // the passes over this panel share the work of fetching the next one
        b.ahead_bytes = (Kind::kRowBytes / 64 + tiles - 1) / tiles * 64;
        size_t from = (size_t)(tile - tile_begin) * groups * b.ahead_bytes;
        if (from < panel_bytes) b.ahead = panel + panel_bytes + from;
      }
      if (tiles > 1) ask_for_results(args, p, t0, rows);
      int4_product<Kind>(rows, x.data + tile * x.tile_bytes(), x.slice_bytes(), b, c);
      finish_tile(args, p, t0, rows, c);
    }
  }
}

static void group_sums(const Tiles& x, int tile_begin, int tile_end, float* out) {
  const int per_slice = x.slice_elements / kInt4Group, bytes = kInt4Group * activation_bytes(x.product);
  for (int tile = tile_begin; tile < tile_end; ++tile)
    for (int s = 0; s < x.num_slices; ++s)
      for (int g = 0; g < per_slice; ++g, out += kTileRows)
        for (int m = 0; m < x.tile_rows && tile * x.tile_rows + m < x.num_rows; ++m) {
          const char* row = x.row(tile * x.tile_rows + m, s) + g * bytes;
          vf total = vzero();
          for (int i = 0; i < bytes; i += W * 4) {
            vi bits = vloadi(row + i);
            total = vadd(total, bytes == 4 * kInt4Group ? vload((const float*)(row + i)) : vadd(vlow(bits), vhigh(bits)));
          }
          out[m] = vsum(total);
        }
}

static void linear(const LinearArgs& args, int panel_begin, int panel_end, int tile_begin, int tile_end,
                   const float* sums) {
  switch (args.weight->product) {
    case Product::kFloat: return linear_of<WeightF32>(args, panel_begin, panel_end, tile_begin, tile_end);
    case Product::kBf16: return linear_of<WeightBf16>(args, panel_begin, panel_end, tile_begin, tile_end);
    case Product::kInt8: return linear_of<Int8ByBf16>(args, panel_begin, panel_end, tile_begin, tile_end);
    case Product::kInt8Float: return linear_of<Int8ByF32>(args, panel_begin, panel_end, tile_begin, tile_end);
    case Product::kHalf: return linear_of<HalfByF32>(args, panel_begin, panel_end, tile_begin, tile_end);
    case Product::kInt8Int8: return linear_of<Int8ByInt8>(args, panel_begin, panel_end, tile_begin, tile_end);
    case Product::kInt4: return linear_of_int4<Int4ByBf16>(args, panel_begin, panel_end, tile_begin, tile_end, sums);
    case Product::kInt4Float: return linear_of_int4<Int4ByF32>(args, panel_begin, panel_end, tile_begin, tile_end, sums);
    case Product::kMxfp4: return linear_of_int4<Mxfp4ByBf16>(args, panel_begin, panel_end, tile_begin, tile_end, sums);
    case Product::kMxfp4Float: return linear_of_int4<Mxfp4ByF32>(args, panel_begin, panel_end, tile_begin, tile_end, sums);
  }
}

}  // namespace KVLOOM_ISA
