// Objects owned by Python: packed weights and the lane table, with the arrays that they point into.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "weight.h"
#include "weight_memory.h"

namespace kvloom {

namespace nb = nanobind;

using IntVector = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntMatrix = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using IntCube = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// (query heads, KV heads, key width, value width, first lane, window or 0)
using ShapeTuple = std::tuple<int, int, int, int, int, int>;

struct PackedWeightObject {
  PackedWeight weight;
  std::shared_ptr<char> data, scale, row_sum, bias;
  std::size_t num_bytes = 0;

  // MXFP4: `source` codes, `source_scale` exponents, as `pack_mxfp4` takes them. Else
  // `source` [n, k] row-major; `source_scale` [n] float for int8 sources; `source_bias` [n] float or 0.
  PackedWeightObject(std::uintptr_t source, int element, int n, int k, int product, bool gated, std::uintptr_t source_scale,
                     std::uintptr_t source_bias) {
    if (n < 1 || k < 1) throw std::invalid_argument("a weight needs at least one row and one column");
    if (is_mxfp4(static_cast<Product>(product)) && k % kInt4Group)
      throw std::invalid_argument("MXFP4 comes in groups of 32 inputs");
    if (gated && n % 2) throw std::invalid_argument("a gated weight has an even number of rows");
    weight = weight_shape(static_cast<Product>(product), n, k, gated);
    if (weight.num_slices > 64) throw std::invalid_argument("a weight this wide is not supported");
    num_bytes = weight_data_bytes(weight);
    data = allocate_weight(num_bytes);
    weight.data = data.get();
    const std::size_t columns = static_cast<std::size_t>(weight.num_panels) * kPanelColumns;
    auto floats = [&](std::shared_ptr<char>& owner) {
      owner = std::shared_ptr<char>(new char[columns * 4](), std::default_delete<char[]>());
      num_bytes += columns * 4;
      return reinterpret_cast<float*>(owner.get());
    };
    if (is_int8(weight.product)) weight.scale = floats(scale);
    if (weight.product == Product::kInt8Int8) weight.row_sum = floats(row_sum);
    if (source_bias) {
      float* packed = floats(bias);
      for (int p = 0; p < weight.num_panels; ++p)
        for (int c = 0; c < kPanelColumns; ++c) {
          const int row = weight_source_row(weight, p, c);
          packed[p * kPanelColumns + c] = row < 0 ? 0.0f : reinterpret_cast<const float*>(source_bias)[row];
        }
      weight.bias = packed;
    }
    nb::gil_scoped_release release;
    if (is_mxfp4(weight.product))
      pack_mxfp4(weight, reinterpret_cast<const uint8_t*>(source), reinterpret_cast<const uint8_t*>(source_scale));
    else
      pack_weight(weight, static_cast<Element>(element), reinterpret_cast<const void*>(source),
                  reinterpret_cast<const float*>(source_scale));
  }
};

struct LanesObject {
  LaneTable table;
  IntCube columns;
  IntMatrix begin, end;
  IntVector segment_start, segment_store, segment_end;
  int num_seqs, num_lanes, num_columns;
  std::size_t arena_bytes;

  LanesObject(std::uintptr_t arena, std::size_t bytes, IntCube columns_, IntMatrix begin_, IntMatrix end_, int block_size,
              int store)
      : columns(columns_), begin(begin_), end(end_), arena_bytes(bytes) {
    num_seqs = static_cast<int>(columns.shape(0));
    num_lanes = static_cast<int>(columns.shape(1));
    num_columns = static_cast<int>(columns.shape(2));
    for (const IntMatrix* bounds : {&begin, &end})
      if (static_cast<int>(bounds->shape(0)) != num_seqs || static_cast<int>(bounds->shape(1)) != num_lanes)
        throw std::invalid_argument("begin and end must be [num_seqs, num_lanes], as the lane table is");
    if (block_size < 16 || block_size % 16)
      throw std::invalid_argument("block_size is " + std::to_string(block_size) + "; these kernels need a multiple of 16");
    table.arena = reinterpret_cast<char*>(arena);
    table.table = columns.data();
    table.seq_stride = static_cast<std::ptrdiff_t>(num_lanes) * num_columns;
    table.lane_stride = num_columns;
    table.begin = begin.data();
    table.end = end.data();
    table.bounds_stride = num_lanes;
    if (static_cast<double>(num_columns) * block_size * block_size >= 4294967296.0)
      throw std::invalid_argument("lanes this long need smaller blocks");
    table.block_size = block_size;
    table.block_inverse = block_inverse_of(block_size);
    table.store = static_cast<Store>(store);
    table.num_lanes = num_lanes;
  }

  void set_segments(IntVector start, IntVector store, IntVector last) {
    if (static_cast<int>(start.shape(0)) != num_seqs * num_lanes + 1)
      throw std::invalid_argument("segment starts must have num_seqs * num_lanes + 1 entries");
    segment_start = start;
    segment_store = store;
    segment_end = last;
    table.segment_start = segment_start.data();
    table.segment_store = segment_store.data();
    table.segment_end = segment_end.data();
  }
};

inline Batch batch_of(const LanesObject& lanes, const IntVector& cu_seqlens, const IntVector& seq_rows) {
  Batch batch;
  batch.num_seqs = static_cast<int>(seq_rows.shape(0));
  if (static_cast<int>(cu_seqlens.shape(0)) != batch.num_seqs + 1)
    throw std::invalid_argument("cu_seqlens must have one entry more than seq_rows");
  batch.cu_seqlens = cu_seqlens.data();
  batch.seq_rows = seq_rows.data();
  for (int b = 0; b < batch.num_seqs; ++b) {
    if (batch.cu_seqlens[b + 1] < batch.cu_seqlens[b]) throw std::invalid_argument("cu_seqlens must not decrease");
    if (batch.seq_rows[b] < 0 || batch.seq_rows[b] >= lanes.num_seqs)
      throw std::invalid_argument("a sequence row lies outside the lane table");
  }
  batch.num_tokens = batch.cu_seqlens[batch.num_seqs];
  return batch;
}

inline LayerShape shape_of(const LanesObject& lanes, const ShapeTuple& tuple) {
  LayerShape shape;
  std::tie(shape.num_heads, shape.num_kv_heads, shape.k_width, shape.v_width, shape.lane_offset, shape.window) = tuple;
  if (shape.num_kv_heads < 1 || shape.num_heads % shape.num_kv_heads)
    throw std::invalid_argument("query heads must be a multiple of KV heads");
  if (shape.k_width < 1 || shape.v_width < 1 || shape.k_width > 384 || shape.v_width > 1024)
    throw std::invalid_argument("keys must be at most 384 and values at most 1024 wide");
  if (shape.lane_offset < 0 || shape.lane_offset + shape.num_kv_heads > lanes.num_lanes)
    throw std::invalid_argument("the layer's lanes lie outside the lane table");
  return shape;
}

// The slots that a batch reads and writes lie inside the table and in blocks inside the arena.
inline void check_slots(const LanesObject& lanes, const Batch& batch, const LayerShape& shape) {
  const LaneTable& t = lanes.table;
  for (int b = 0; b < batch.num_seqs; ++b) {
    const int n = batch.cu_seqlens[b + 1] - batch.cu_seqlens[b];
    if (n == 0) continue;
    for (int g = 0; g < shape.num_kv_heads; ++g) {
      const std::ptrdiff_t at = batch.seq_rows[b] * t.bounds_stride + shape.lane_offset + g;
      const int begin = t.begin[at], end = t.end[at];
      if (begin < 0 || end - n < begin || end > lanes.num_columns * t.block_size)
        throw std::invalid_argument("lane bounds [" + std::to_string(begin) + ", " + std::to_string(end) + ") of sequence row " +
                                    std::to_string(batch.seq_rows[b]) + " do not hold its " + std::to_string(n) +
                                    " new tokens inside the lane table");
      const int32_t* column = t.table + batch.seq_rows[b] * t.seq_stride + (shape.lane_offset + g) * t.lane_stride;
      int first = begin;
      if (shape.window && end - n + 1 - shape.window > first) first = end - n + 1 - shape.window;
      for (int c = first / t.block_size; c <= (end - 1) / t.block_size; ++c)
        if (column[c] < 0 || static_cast<std::size_t>(column[c]) * 128 >= lanes.arena_bytes)
          throw std::invalid_argument("column " + std::to_string(c) + " of a lane is visible but has no block in the arena");
    }
  }
}

}  // namespace kvloom
