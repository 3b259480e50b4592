// Packing of weights, once, and of the activations that are multiplied by them.
#pragma once

#include "kernels/kernels.h"
#include "thread_pool.h"

namespace kvloom {

// Fill in the shape fields of a packed weight of [n, k]; `gated` interleaves the two halves of n, which must be
// multiples of 16 each. The caller allocates `data_bytes` and, for int8, scale, and for kInt8Int8 row_sum.
PackedWeight weight_shape(Product product, int n, int k, bool gated);
std::size_t weight_data_bytes(const PackedWeight& weight);

// Row of the source that output column `c` of panel `p` holds, or -1 for padding.
int weight_source_row(const PackedWeight& weight, int p, int c);

// Pack row-major `source` [n, k] of `element` (kInt8 with `source_scale` [n], or float kinds, which are quantised per
// row or group if the product is int8 or int4) into weight.data, .scale and .row_sum. Runs on all threads.
void pack_weight(PackedWeight& weight, Element element, const void* source, const float* source_scale);

// Pack MXFP4 into a weight of kMxfp4 or kMxfp4Float without conversion: codes [n, k / 32, 16 bytes], the first of two in the low
// half, and exponents [n, k / 32] with a bias of 127. k is a multiple of 32.
void pack_mxfp4(PackedWeight& weight, const uint8_t* codes, const uint8_t* exponents);

// Read row `row` of an ungated weight back, as float: the embedding of a model that ties it to its output layer.
void unpack_row(const PackedWeight& weight, int row, float* out);

// Tiles for `num_rows` activations of `k` in the compute dtype of `product`; the caller owns `data` and `scale`.
Tiles tiles_shape(Product product, int num_rows, int k);

// y = x w^T by the whole team; `x` must be packed and visible (barrier before). No barrier after.
void linear(Team& team, const LinearArgs& args);

}  // namespace kvloom
