// What every instruction set provides: plain structs and one table of functions per set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "store.h"

namespace kvloom {

// Weight format and compute dtype of a linear layer.
enum class Product : int {
  kFloat = 0,     // float32 weight and activations
  kBf16 = 1,      // bf16 weight and activations, float32 sums
  kInt8 = 2,      // int8 weight (a scale per output), bf16 activations
  kInt8Float = 3, // int8 weight (a scale per output), float32 activations
  kInt8Int8 = 4,  // int8 weight, activations quantised per row when they are packed; exact int32 sums
  kHalf = 5,      // IEEE half weight, float32 activations
  kInt4 = 6,      // int4 weight (a scale and an offset per output and 32 inputs), bf16 activations
  kInt4Float = 7, // the same, float32 activations
  kMxfp4 = 8,     // MXFP4 weight (e2m1, a power of two per output and 32 inputs), bf16 activations
  kMxfp4Float = 9,  // the same, float32 activations
};

constexpr int kPanelColumns = 32;
constexpr int kTileRows = 12;
constexpr int kTileRowBytes = 1600;
constexpr int kTileSliceBytes = 1536;

// A row of a panel of int4: 32 inputs of its 32 outputs, [8 inputs x 4][32][4 bytes of codes][32 scales][32 offsets].
// Input i of eight is bits 16 (i % 2) + 4 (i / 2) of its output's 32; scales and offsets are in IEEE half.
constexpr int kInt4Group = 32;
constexpr int kInt4CodeBytes = kInt4Group * kPanelColumns / 2;
constexpr int kInt4RowBytes = kInt4CodeBytes + 2 * kPanelColumns * 2;
// MXFP4's rows are [8 inputs x 4][32][4 bytes of codes][32 exponents with a bias of 127], codes in the same bits.
constexpr int kMxfp4RowBytes = kInt4CodeBytes + kPanelColumns;
constexpr int int4_shift(int i) { return 16 * (i % 2) + 4 * (i % 8 / 2); }

constexpr bool is_int4(Product p) { return p == Product::kInt4 || p == Product::kInt4Float; }
constexpr bool is_mxfp4(Product p) { return p == Product::kMxfp4 || p == Product::kMxfp4Float; }
constexpr bool is_int8(Product p) {
  return p == Product::kInt8 || p == Product::kInt8Float || p == Product::kInt8Int8;
}
constexpr int activation_bytes(Product p) {
  return p == Product::kInt8Int8                                                                      ? 1
         : p == Product::kBf16 || p == Product::kInt8 || p == Product::kInt4 || p == Product::kMxfp4 ? 2
                                                                                                      : 4;
}
// Inputs in a row of a panel, and bytes of that row.
constexpr int weight_per(Product p) {
  return is_int4(p) || is_mxfp4(p) ? kInt4Group : is_int8(p) ? 4 : p == Product::kBf16 ? 2 : 1;
}
constexpr int panel_row_bytes(Product p) {
  return is_int4(p)    ? kInt4RowBytes
         : is_mxfp4(p) ? kMxfp4RowBytes
                       : kPanelColumns * weight_per(p) * (is_int8(p) ? 1 : p == Product::kFloat ? 4 : 2);
}

// Activations of T tokens, cut into tiles of at most 12 rows and slices of at most 1536 bytes of k:
// [tile][slice][tile_rows][1600 bytes]. `scale` [T] belongs to kInt8Int8.
struct Tiles {
  char* data = nullptr;
  float* scale = nullptr;
  Product product = Product::kFloat;
  int num_rows = 0;      // T
  int tile_rows = 1;     // rows of a full tile
  int k = 0;             // elements of a row
  int num_slices = 1;
  int slice_elements = 0;

  int num_tiles() const { return (num_rows + tile_rows - 1) / tile_rows; }
  size_t slice_bytes() const { return (size_t)tile_rows * kTileRowBytes; }
  size_t tile_bytes() const { return num_slices * slice_bytes(); }
  size_t bytes() const { return num_tiles() * tile_bytes(); }
  char* row(int t, int slice) const {
    return data + (t / tile_rows) * tile_bytes() + slice * slice_bytes() + (size_t)(t % tile_rows) * kTileRowBytes;
  }
};

// One resident copy of a weight [N, K]: panels of 32 outputs, [panel][k / per][32][per] (int4: see kInt4Group), zero
// padded.
struct PackedWeight {
  Product product = Product::kFloat;
  int n = 0;             // outputs
  int k = 0;             // inputs
  int num_panels = 0;
  int num_slices = 1;    // as in Tiles
  int slice_elements = 0;
  bool gated = false;    // rows come as [gate; up]; a panel holds 16 of each, side by side
  char* data = nullptr;
  float* scale = nullptr;    // [num_panels * 32], int8 only
  float* row_sum = nullptr;  // [num_panels * 32], sum of codes, kInt8Int8 only
  const float* bias = nullptr;  // [num_panels * 32] in panel order, or null

  size_t panel_rows() const { return (size_t)num_slices * slice_elements / weight_per(product); }
  size_t panel_bytes() const { return panel_rows() * panel_row_bytes(product); }
};

enum class Activation : int {
  kSilu = 0,
  kGeluTanh = 1,
  kGelu = 2,
  kRelu2 = 3,        // max(x, 0) squared
  kXielu = 4,        // alpha x^2 + beta x above 0, limit (e^x - 1 - x) + beta x below; see LinearArgs
  kClampedGate = 8,  // of gate and up together: (up' + 1) gate' sigmoid(alpha gate'), both clamped at `limit`; see LinearArgs
};

enum class Finish : int {
  kStore = 0,  // y[t, n] = value, in `element`
  kAdd = 1,    // y[t, n] += value, float32
  kGate = 2,   // y[t, j] = activation(gate_j) * up_j, j < n / 2, in `element`
  kGateTiles = 3,  // the same into `tiles` (of any product but kInt8Int8)
  kActivate = 4,   // y[t, n] = activation(value), in `element`
  kActivateTiles = 5,  // the same into `tiles`, as kGateTiles
  kAddTo = 6,      // y[to[t], n] += by[t] * value, float32
};

struct LinearArgs {
  const PackedWeight* weight;
  const Tiles* x;
  Finish finish;
  Element element;
  Activation activation;
  void* y;
  size_t y_stride;     // elements between rows
  const Tiles* tiles;  // kGateTiles, kActivateTiles; cut into tiles as `x` is
  const int32_t* to = nullptr;  // kAddTo: [T] rows of y, each at most once
  const float* by = nullptr;    // kAddTo: [T]
  float alpha = 0, limit = 0;   // kClampedGate: gate' = min(gate, limit), up' = clamp(up, -limit, limit); kXielu
  float beta = 0;               // kXielu
};

// Elements that a head of `width` takes in a block, zeros at its end included: what a product reads at once.
constexpr int block_width(int width) { return (width + 15) / 16 * 16; }

// A reader of one lane: `columns` are arena addresses in granules of 128 bytes; slot s lives in column s / P.
struct Lane {
  const int32_t* columns;
  const char* arena;
  int block_size;  // P
  uint32_t block_inverse;  // ceil(2^32 / P): slot / P without dividing, see divide_by_block
  int k_width;  // in the block: multiples of 16
  int v_width;
  // Stores by column: segment i covers columns below segment_end[i]; one segment unless the lane mixes stores.
  int num_segments;
  const int32_t* segment_store;  // Store values
  const int32_t* segment_end;
  Store store;  // if num_segments is 0
};

constexpr uint32_t block_inverse_of(int block_size) {
  return (uint32_t)(((uint64_t)1 << 32) / (uint64_t)block_size + 1);
}
// Exact for slot * block_size < 2^32.
constexpr int divide_by_block(int slot, uint32_t inverse) { return (int)(((uint64_t)(uint32_t)slot * inverse) >> 32); }

// A whole block of one lane, to be encoded: `from` and `to` are its bytes in two stores. `from` is native.
struct EncodeArgs {
  Store from_store, to_store;
  int block_size, k_width, v_width;
  const char* from;
  char* to;
};

struct AttendArgs {
  Lane lane;
  Element compute;        // kFloat or kBf16: compute dtype of queries and probabilities
  const char* queries;    // [ceil(rows / 12)][12][1600 bytes], scaled
  int num_rows;
  const int32_t* first;   // [rows] visible slots are [first, last) per row
  const int32_t* last;
  int slot_begin;         // part of the context that is read
  int slot_end;
  int lane_end;           // slots from here on hold no values
  float softcap;          // 0: none; scores are then natural, else in units of log 2
  const float* slope;     // [rows] ALiBi slope (natural units) or null
  const int32_t* position;// [rows] slot of the query itself, with slope; with slot_position the position of its token
  const int32_t* slot_position;  // [slots] positions of the tokens in them, or null: slots are as far apart as tokens
  const float* bias;      // [slots] natural units, or null
  float* peak;            // [rows] out, running maximum in units of log 2
  float* total;           // [rows] out
  float* sum;             // [rows, v_width] out
  int part_slots;         // 0, or: slots from every multiple of it on have a result of their own, a power of two >= 256,
  ptrdiff_t part_stride;  // that many floats behind the one before
  const AttendArgs* upcoming;  // arguments of this thread's next call (only lane and slots are used), or null
};

struct MassArgs {
  AttendArgs attend;
  const float* lse;  // [rows] natural
  float* mass;       // [slot_end - slot_begin] += sum over rows of exp(score - lse)
};

struct Kernels {
  const char* name;
  // `sums` of these tiles by group_sums, for int4 weights.
  void (*linear)(const LinearArgs&, int panel_begin, int panel_end, int tile_begin, int tile_end, const float* sums);
  // Sums of every 32 inputs of tiles: out [tiles][k / 32][12], the rows of a tile last.
  void (*group_sums)(const Tiles&, int tile_begin, int tile_end, float* out);
  // Codes [n], scale and offset [2] of up to 32 weights in int4, as int4_group.h says.
  void (*int4_fit)(const float* weight, int n, int8_t* code, float* scale_offset);
  void (*pack_row)(const Tiles&, int row, const float* x);
  void (*to_float)(Element, const void* x, float* y, size_t n);
  void (*from_float)(Element, const float* x, void* y, size_t n);
  void (*scaled)(Element from, const void* x, float by, Element to, void* y, size_t n);  // y = x * by; y may be x
  // out = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  // out = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias, null for no bias
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float eps, float* out);
  void (*add)(float* x, const float* y, int n);
  void (*gate)(Activation, const float* gate, const float* up, int n, float* out);
  void (*rope)(float* head, int width, const float* cos_sin, int rotary);
  void (*write_slot)(const Lane&, int slot, const float* k, const float* v);
  // Gives the bits that `write_slot` gives slot by slot.
  void (*encode_block)(const EncodeArgs&, char* scratch);
  void (*attend)(const AttendArgs&, char* scratch);
  // Join the results of `count` parts for one row, `stride` floats apart: *peak, *total and sum [width] as if of one.
  void (*join)(const float* peaks, const float* totals, const float* sums, ptrdiff_t stride, int count, int width,
               float* peak, float* total, float* sum);
  void (*mass)(const MassArgs&, char* scratch);
  int (*argmax)(const float* x, int n);
  double (*read_probe)(const char* p, size_t bytes);
  double (*flop_probe)(Product, long iterations);  // returns operations done
};

constexpr size_t kKernelScratchBytes = 512 << 10;

}  // namespace kvloom
