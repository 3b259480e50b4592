// 32 inputs of one output in four bits: codes from -8 to 7, a scale and an offset, both in IEEE half.
#pragma once

namespace kvloom {

// Quantise `n` <= 32 weights as column `column` of a row of an int4 panel (kernels.h), whose bytes are zero before.
//
// weight = scale * code + offset. There are eight ways to round to codes: the range of the weights is cut into 15, 14,
// .., 8 steps. For each, scale and offset are fitted by least squares, and the one of least squared error is chosen, the
// first of equals. So weights on at most 16 equidistant values are kept, however many of these values occur.
void pack_int4_group(const float* weight, int n, char* row, int column);

// Read the `n` weights of such a column back.
void unpack_int4_group(const char* row, int column, int n, float* weight);

}  // namespace kvloom
