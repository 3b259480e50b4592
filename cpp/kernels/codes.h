// Codes of one byte. An element is its code's value times the scale of its slot; the largest element of a slot gets the
// largest value. A code has its rounding, its value, and its value in vectors.
#pragma once

#include <float.h>

#include "store.h"
#include "vec.h"

namespace KVLOOM_ISA {

typedef uint32_t vu __attribute__((vector_size(4 * W)));  // the bits of a vector of floats

struct Int8Code {  // symmetric integers
  static constexpr float kTop = 127;
  static inline uint32_t code(float x) { return (uint32_t)(int32_t)__builtin_rintf(x) & 255; }
  static inline float value(uint8_t code) { return (float)(int8_t)code; }
  template <int J> static inline vf byte(vi words) { return vbyte<J>(words); }
};

// FP8 e4m3 of OCP's "OFP8": sign, four bits of exponent with bias 7, three of mantissa, no infinity, NaN at 127.
struct E4m3Code {
  static constexpr float kTop = 448;
  // To nearest even; beyond the largest value to that one.
  static inline uint32_t code(float x) {
    const uint32_t bits = float_bits(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffffu;
    const uint32_t least = 0x3c800000u, most = 0x43e00000u;  // 2^-6, the smallest normal number, and 448
    const uint32_t held = magnitude > most ? most : magnitude;
    // Below 2^-6 a unit is 2^-9, the last bit of floats from 2^14 on: their adder rounds.
    const uint32_t subnormal = float_bits(bits_float(held) + 0x1p14f) - 0x46800000u;
    const uint32_t normal = (held - 0x3c000000u + 0x7ffffu + (held >> 20 & 1)) >> 20;
    const uint32_t found = held < least ? subnormal : normal;
    return sign | (magnitude > 0x7f800000u ? 0x7fu : found);
  }
  static inline float value(uint8_t code) {
    const float f = bits_float(((uint32_t)(code & 0x7f) << 20) + 0x3c000000u), twice = 2 * f - 0x1p-6f;
    const float magnitude = f < twice ? f : twice;
    return code & 0x80 ? -magnitude : magnitude;
  }
  // Exponent and mantissa shifted to those of a float whose exponent is 120 more: f, the value of a normal number. For
  // a subnormal one f = 2^-7 (1 + m / 8), and 2 f - 2^-6 is its value; for others that is more than f.
  template <int J> static inline vf byte(vi words) {
    const vu top = J == 3 ? (vu)words : (vu)words << (24 - 8 * J);
    const vf f = (vf)((top >> 4 & 0x07f00000u) + 0x3c000000u);
    const vf magnitude = vmin(f, vfma(f, vset(2.0f), vset(-0x1p-6f)));
    return (vf)((vu)magnitude | (top & 0x80000000u));
  }
};

// call(Code) for the code of an element that has one.
#define KVLOOM_BY_CODE(element, call)       \
  switch (element) {                        \
    case Element::kE4m3: call(E4m3Code); break; \
    default: call(Int8Code);                \
  }

// code(x * inverse), x ~ value * scale. The scale is the smallest normal number where the largest element has a smaller
// one, so that codes are finite; a row of zeros has scale 0.
struct CodeScale {
  float scale, inverse;
};
template <class Code> static inline CodeScale code_scale(float peak) {
  if (!(peak > 0)) return {0, 0};
  const float scale = peak / Code::kTop;
  if (scale < FLT_MIN) return {FLT_MIN, 1.0f / FLT_MIN};
  return {scale, Code::kTop / peak};
}

}  // namespace KVLOOM_ISA
