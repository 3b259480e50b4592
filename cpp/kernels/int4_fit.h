// Four-bit codes of up to 32 weights, with the best scale and offset.
#pragma once

#include "linear.h"

namespace KVLOOM_ISA {

constexpr int kWays = 8;
constexpr float kMostSteps = 15.0f;
// Adding and taking away 1.5 * 2^23 rounds floats below 2^22 to the nearest integer, halves to even, in vectors.
constexpr float kRounding = 12582912.0f;

typedef float Ways __attribute__((vector_size(4 * kWays)));  // of rounding, side by side

static inline void round_to_half(Ways* x) {
  float wide[kWays];
  uint16_t half[kWays];
  memcpy(wide, x, sizeof(wide));
  convert_from_float(Element::kHalf, wide, half, kWays);
  convert_to_float(Element::kHalf, half, wide, kWays);
  memcpy(x, wide, sizeof(wide));
}

// weight [n] = scale * code + offset, codes from -8 to 7; `scale_offset` [2] are in half precision already. Ways: see
// int4_group.h. Sums run over the weights in order, in every instruction set the same.
static void int4_fit(const float* weight, int n, int8_t* code, float* scale_offset) {
  float low = weight[0], high = weight[0], mean = 0;
  for (int i = 0; i < n; ++i) {
    low = weight[i] < low ? weight[i] : low;
    high = weight[i] > high ? weight[i] : high;
    mean += weight[i];
  }
  const float range = high - low, count = (float)n;
  mean /= count;
  Ways inverse = {}, code_mean = {}, square = {}, product = {}, error = {}, codes[kInt4Group];
  for (int way = 0; way < kWays; ++way) inverse[way] = range > 0 ? (kMostSteps - (float)way) / range : 0.0f;
  for (int i = 0; i < n; ++i) {
    codes[i] = (((weight[i] - low) * inverse + kRounding) - kRounding) - 8.0f;
    code_mean += codes[i];
  }
  code_mean /= count;
  for (int i = 0; i < n; ++i) {
    const Ways from_mean = codes[i] - code_mean;
    square += from_mean * from_mean;
    product += from_mean * (weight[i] - mean);
  }
  Ways scale = {};
  for (int way = 0; way < kWays; ++way) scale[way] = square[way] > 0 ? product[way] / square[way] : 0.0f;
  Ways offset = mean - scale * code_mean;
  round_to_half(&offset);
  round_to_half(&scale);
  for (int i = 0; i < n; ++i) {
    const Ways left = (scale * codes[i] + offset) - weight[i];
    error += left * left;
  }
  int best = 0;
  for (int way = 1; way < kWays; ++way)
    if (error[way] < error[best]) best = way;
  for (int i = 0; i < n; ++i) code[i] = (int8_t)(int)codes[i][best];
  scale_offset[0] = scale[best];
  scale_offset[1] = offset[best];
}

}  // namespace KVLOOM_ISA
