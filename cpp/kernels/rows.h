// Operations on one row of floats: norm, rotary embedding, gate, argmax.
#pragma once

#include "attend.h"

namespace KVLOOM_ISA {

static void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  vf squares = vzero(), squares2 = vzero();
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    vf a = vload(x + i), b = vload(x + i + W);
    squares = vfma(a, a, squares);
    squares2 = vfma(b, b, squares2);
  }
  float total = vsum(vadd(squares, squares2));
  for (; i < n; ++i) total += x[i] * x[i];
  float scale = 1.0f / __builtin_sqrtf(total / (float)n + eps);
  vf s = vset(scale);
  for (i = 0; i + W <= n; i += W) vstore(out + i, vmul(vmul(vload(x + i), s), vload(weight + i)));
  for (; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

static void layer_norm(const float* x, const float* weight, const float* bias, int n, float eps, float* out) {
  vf sums = vzero(), sums2 = vzero();
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sums = vadd(sums, vload(x + i));
    sums2 = vadd(sums2, vload(x + i + W));
  }
  float total = vsum(vadd(sums, sums2));
  for (; i < n; ++i) total += x[i];
  const float mean = total / (float)n;
  const vf shift = vset(mean);
  vf squares = vzero(), squares2 = vzero();
  for (i = 0; i + 2 * W <= n; i += 2 * W) {
    vf a = vsub(vload(x + i), shift), b = vsub(vload(x + i + W), shift);
    squares = vfma(a, a, squares);
    squares2 = vfma(b, b, squares2);
  }
  total = vsum(vadd(squares, squares2));
  for (; i < n; ++i) total += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf(total / (float)n + eps);
  const vf s = vset(scale);
  for (i = 0; i + W <= n; i += W) {
    vf y = vmul(vmul(vsub(vload(x + i), shift), s), vload(weight + i));
    vstore(out + i, bias ? vadd(y, vload(bias + i)) : y);
  }
  for (; i < n; ++i) out[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f);
}

static void add(float* x, const float* y, int n) {
  int i = 0;
  for (; i + W <= n; i += W) vstore(x + i, vadd(vload(x + i), vload(y + i)));
  for (; i < n; ++i) x[i] += y[i];
}

static void gate(Activation activation, const float* g, const float* up, int n, float* out) {
  int i = 0;
  for (; i + W <= n; i += W) vstore(out + i, vmul(activate(activation, vload(g + i)), vload(up + i)));
  if (i < n) {
    float a[W] = {0}, b[W] = {0};
    memcpy(a, g + i, (n - i) * 4);
    memcpy(b, up + i, (n - i) * 4);
    vstore(a, vmul(activate(activation, vload(a)), vload(b)));
    memcpy(out + i, a, (n - i) * 4);
  }
}

// Half-split rotation: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x2 half of `rotary` behind x1.
static void rope(float* head, int, const float* cos_sin, int rotary) {
  const int half = rotary / 2;
  const float* c = cos_sin;
  const float* s = cos_sin + half;
  int i = 0;
  for (; i + W <= half; i += W) {
    vf x1 = vload(head + i), x2 = vload(head + half + i), co = vload(c + i), si = vload(s + i);
    vstore(head + i, vsub(vmul(x1, co), vmul(x2, si)));
    vstore(head + half + i, vfma(x2, co, vmul(x1, si)));
  }
  for (; i < half; ++i) {
    float x1 = head[i], x2 = head[half + i];
    head[i] = x1 * c[i] - x2 * s[i];
    head[half + i] = x2 * c[i] + x1 * s[i];
  }
}

// First index of the largest value.
static int argmax(const float* x, int n) {
  vf top = vset(kMinusInf);
  int i = 0;
  for (; i + W <= n; i += W) top = vmax(top, vload(x + i));
  float peak = vpeak(top);
  for (; i < n; ++i) peak = x[i] > peak ? x[i] : peak;
  for (i = 0; i < n; ++i)
    if (x[i] == peak) return i;
  return 0;
}

// Read `bytes` once, as a kernel would; the sum keeps the compiler from removing the loads.
static double read_probe(const char* p, size_t bytes) {
  vi total = vseti(0), second = vseti(0);
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    for (int line = 0; line < 4; ++line) prefetch(p + i + 9216 + 64 * line);
    for (int j = 0; j < 256; j += 2 * W * 4) {
#if defined(KVLOOM_AVX512)
      total = _mm512_add_epi32(total, vloadi(p + i + j));
      second = _mm512_add_epi32(second, vloadi(p + i + j + 4 * W));
#elif defined(KVLOOM_AVX2)
      total = _mm256_add_epi32(total, vloadi(p + i + j));
      second = _mm256_add_epi32(second, vloadi(p + i + j + 4 * W));
#else
      total += vloadi(p + i + j);
      second += vloadi(p + i + j + 4 * W);
#endif
    }
  }
  return (double)vsum(vadd(vfromi(total), vfromi(second)));
}

template <class Kind> static double flops_of(long iterations) {
  float c[12 * 32] __attribute__((aligned(64)));
  static char a[12 * kRowBytes] __attribute__((aligned(64)));
  static char b[1024] __attribute__((aligned(64)));
  const char* column[2] = {b, b + 256};
  Columns columns = {column, nullptr, 1, 256, 0, 0};
  int rows = 12;
  for (long i = 0; i < iterations; ++i) {
    // Hides the operands from the compiler, so that it generates the product of linear layers and keeps every sum.
    __asm__ volatile("" : "+r"(rows) : "r"(&columns), "r"(c) : "memory");
    product<Kind, 2>(rows, a, 0, columns, c, 32, false);
  }
  return 2.0 * 12 * 32 * 256 * Kind::kPer * (double)iterations;
}

static double flop_probe(Product p, long iterations) {
  if (p == Product::kFloat) return flops_of<WeightF32>(iterations);
  if (p == Product::kInt8Int8) return flops_of<Int8ByInt8>(iterations);
  return flops_of<WeightBf16>(iterations);
}

}  // namespace KVLOOM_ISA
