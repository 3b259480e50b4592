#include "int4_group.h"

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace kvloom {

namespace {

constexpr int kWays = 8;
constexpr int kMostSteps = 15;
// Adding and taking away 1.5 * 2^23 rounds floats below 2^22 to the nearest integer, halves to even, in vectors.
constexpr float kRounding = 12582912.0f;

// Codes of all ways beside each other, so that every loop over them is one of vectors.
struct Ways {
  float code[kInt4Group][kWays];
  float scale[kWays], offset[kWays], error[kWays];
};

void round_codes(const float* weight, int n, Ways& ways) {
  float low = weight[0], high = weight[0];
  for (int i = 1; i < n; ++i) {
    low = weight[i] < low ? weight[i] : low;
    high = weight[i] > high ? weight[i] : high;
  }
  const float range = high - low;
  float inverse[kWays];
  for (int way = 0; way < kWays; ++way) inverse[way] = range > 0 ? static_cast<float>(kMostSteps - way) / range : 0.0f;
  for (int i = 0; i < n; ++i)
    for (int way = 0; way < kWays; ++way)
      ways.code[i][way] = ((weight[i] - low) * inverse[way] + kRounding) - kRounding - 8.0f;
}

// Least squares of scale * code + offset, rounded to half, and what error is left.
void fit(const float* weight, int n, Ways& ways) {
  const Kernels& kernel = kernels();
  const float count = static_cast<float>(n);
  float mean = 0, code_mean[kWays] = {}, square[kWays] = {}, product[kWays] = {};
  for (int i = 0; i < n; ++i) {
    mean += weight[i];
    for (int way = 0; way < kWays; ++way) code_mean[way] += ways.code[i][way];
  }
  mean /= count;
  for (int way = 0; way < kWays; ++way) code_mean[way] /= count;
  for (int i = 0; i < n; ++i)
    for (int way = 0; way < kWays; ++way) {
      const float from_mean = ways.code[i][way] - code_mean[way];
      square[way] += from_mean * from_mean;
      product[way] += from_mean * (weight[i] - mean);
    }
  uint16_t half[2 * kWays];
  for (int way = 0; way < kWays; ++way) {
    ways.scale[way] = square[way] > 0 ? product[way] / square[way] : 0.0f;
    ways.offset[way] = mean - ways.scale[way] * code_mean[way];
    ways.error[way] = 0;
  }
  kernel.from_float(Element::kHalf, ways.scale, half, kWays);
  kernel.from_float(Element::kHalf, ways.offset, half + kWays, kWays);
  kernel.to_float(Element::kHalf, half, ways.scale, kWays);
  kernel.to_float(Element::kHalf, half + kWays, ways.offset, kWays);
  for (int i = 0; i < n; ++i)
    for (int way = 0; way < kWays; ++way) {
      const float left = (ways.scale[way] * ways.code[i][way] + ways.offset[way]) - weight[i];
      ways.error[way] += left * left;
    }
}

}  // namespace

void pack_int4_group(const float* weight, int n, char* row, int column) {
  Ways ways;
  round_codes(weight, n, ways);
  fit(weight, n, ways);
  int best = 0;
  for (int way = 1; way < kWays; ++way)
    if (ways.error[way] < ways.error[best]) best = way;
  for (int i = 0; i < n; ++i) {
    char* at = row + (i / 8 * kPanelColumns + column) * 4;
    uint32_t word;
    std::memcpy(&word, at, 4);
    word |= (static_cast<uint32_t>(static_cast<int>(ways.code[i][best])) & 15u) << int4_shift(i);
    std::memcpy(at, &word, 4);
  }
  const float found[2] = {ways.scale[best], ways.offset[best]};
  uint16_t half[2];
  kernels().from_float(Element::kHalf, found, half, 2);
  std::memcpy(row + kInt4CodeBytes + column * 2, &half[0], 2);
  std::memcpy(row + kInt4CodeBytes + (kPanelColumns + column) * 2, &half[1], 2);
}

void unpack_int4_group(const char* row, int column, int n, float* weight) {
  uint16_t half[2];
  float found[2];
  std::memcpy(&half[0], row + kInt4CodeBytes + column * 2, 2);
  std::memcpy(&half[1], row + kInt4CodeBytes + (kPanelColumns + column) * 2, 2);
  kernels().to_float(Element::kHalf, half, found, 2);
  for (int i = 0; i < n; ++i) {
    uint32_t word;
    std::memcpy(&word, row + (i / 8 * kPanelColumns + column) * 4, 4);
    const int code = static_cast<int32_t>(word << (28 - int4_shift(i))) >> 28;
    weight[i] = found[0] * static_cast<float>(code) + found[1];
  }
}

}  // namespace kvloom
