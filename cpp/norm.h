// The norm of one row: RMSNorm, or LayerNorm with or without a bias.
#pragma once

#include "kernels/kernels.h"

namespace kvloom {

struct Norm {
  const float* weight = nullptr;  // null: there is no norm
  const float* bias = nullptr;    // of a LayerNorm, or null
  bool centred = false;           // a LayerNorm: the mean is subtracted first
  float eps = 0;

  explicit operator bool() const { return weight != nullptr; }
};

// out [n] = the norm of x [n]; `out` may be `x`.
inline void normalise(const Kernels& kernel, const Norm& norm, const float* x, int n, float* out) {
  if (norm.centred)
    kernel.layer_norm(x, norm.weight, norm.bias, n, norm.eps, out);
  else
    kernel.rms_norm(x, norm.weight, n, norm.eps, out);
}

}  // namespace kvloom
