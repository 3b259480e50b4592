// Vectors of W floats for the instruction set that this translation unit is compiled for.
//
// Every kernel source is compiled once per instruction set, inside namespace KVLOOM_ISA. Nothing here may pull in
// library templates: a weak symbol compiled with wide vectors could be chosen for the whole binary by the linker.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(KVLOOM_AVX512) || defined(KVLOOM_AVX2)
#include <immintrin.h>
#endif

namespace KVLOOM_ISA {

static inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float bf16_float(uint16_t x) { return bits_float((uint32_t)x << 16); }
// Round to nearest even; NaN stays NaN.
static inline uint16_t float_bf16(float x) {
  uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
static inline float half_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) return bits_float(sign | float_bits((float)mantissa * 0x1p-24f));
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}
static inline uint16_t float_half(float x) {
  uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
  if (magnitude < 0x38800000u) {  // subnormal in half precision: let the float adder round
    float shifted = bits_float(magnitude) + 0.5f;
    return (uint16_t)(sign | (float_bits(shifted) - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

#if defined(KVLOOM_AVX512)

typedef __m512 vf;
typedef __m512i vi;
constexpr int W = 16;
static inline vf vset(float x) { return _mm512_set1_ps(x); }
static inline vf vzero() { return _mm512_setzero_ps(); }
static inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
static inline void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
static inline vi vloadi(const void* p) { return _mm512_loadu_si512(p); }
static inline vi vseti(int32_t x) { return _mm512_set1_epi32(x); }
static inline void vstorei(void* p, vi x) { _mm512_storeu_si512(p, x); }
static inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vround(vf a) { return _mm512_roundscale_ps(a, 0); }
static inline vf vscale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }
static inline float vsum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float vpeak(vf a) { return _mm512_reduce_max_ps(a); }
static inline float vfirst(vf a) { return _mm512_cvtss_f32(a); }
static inline bool vabove(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }  // in any lane
static inline vf vabs(vf a) { return _mm512_abs_ps(a); }
static inline vf vlow(vi a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
static inline vf vhigh(vi a) { return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000u))); }
template <int J> static inline vf vbyte(vi a) {  // signed byte J of every 32-bit lane
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(J == 3 ? a : _mm512_slli_epi32(a, 24 - 8 * J), 24));
}
template <int J> static inline vf vnibble(vi a) {  // signed four bits from bit 4 J of every 32-bit lane, by table lookup
  const vf table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return _mm512_permutexvar_ps(J == 0 ? a : _mm512_srli_epi32(a, 4 * J), table);
}
template <int J> static inline vf ve2m1(vi a) {  // four bits from bit 4 J of every 32-bit lane: sign, two of exponent, mantissa
  const vf table = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  return _mm512_permutexvar_ps(J == 0 ? a : _mm512_srli_epi32(a, 4 * J), table);
}
static inline vf vload_power(const uint8_t* p) {  // 2^(p - 127)
  const vi bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), 23);
  return _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_set1_epi32(0x00400000)));
}
static inline vf vfromi(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vf vload_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline void vstore_bf16(uint16_t* p, vf x) {
#if defined(KVLOOM_BF16)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
  vi bits = _mm512_castps_si512(x);
  vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  vi rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  vi quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
#endif
}
static inline vf vload_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void vstore_half(uint16_t* p, vf x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0)); }

#elif defined(KVLOOM_AVX2)

typedef __m256 vf;
typedef __m256i vi;
constexpr int W = 8;
static inline vf vset(float x) { return _mm256_set1_ps(x); }
static inline vf vzero() { return _mm256_setzero_ps(); }
static inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
static inline void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
static inline vi vloadi(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline vi vseti(int32_t x) { return _mm256_set1_epi32(x); }
static inline void vstorei(void* p, vi x) { _mm256_storeu_si256((__m256i*)p, x); }
static inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vround(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf vscale2(vf a, vf n) {  // n is integral and in [-126, 127]
  vi exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
static inline float vsum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float vpeak(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline float vfirst(vf a) { return _mm256_cvtss_f32(a); }
static inline bool vabove(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
static inline vf vabs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf vlow(vi a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
static inline vf vhigh(vi a) { return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32((int)0xffff0000u))); }
template <int J> static inline vf vbyte(vi a) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(J == 3 ? a : _mm256_slli_epi32(a, 24 - 8 * J), 24));
}
template <int J> static inline vf vnibble(vi a) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(J == 7 ? a : _mm256_slli_epi32(a, 28 - 4 * J), 28));
}
template <int J> static inline vf ve2m1(vi a) {  // a lookup uses three bits; the sign is shifted to its bit
  const vf table = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
  const vi sign = _mm256_and_si256(J == 7 ? a : _mm256_slli_epi32(a, 28 - 4 * J), _mm256_set1_epi32((int)0x80000000u));
  return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, J == 0 ? a : _mm256_srli_epi32(a, 4 * J)), _mm256_castsi256_ps(sign));
}
static inline vf vload_power(const uint8_t* p) {  // 2^(p - 127)
  const vi bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), 23);
  return _mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_set1_epi32(0x00400000)));
}
static inline vf vfromi(vi a) { return _mm256_cvtepi32_ps(a); }
static inline vf vload_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline void vstore_bf16(uint16_t* p, vf x) {
  float lane[8];
  _mm256_storeu_ps(lane, x);
  for (int i = 0; i < 8; ++i) p[i] = float_bf16(lane[i]);
}
static inline vf vload_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void vstore_half(uint16_t* p, vf x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, 0)); }

#else  // portable: four floats in the compiler's own vector type

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
constexpr int W = 4;
static inline vf vset(float x) { return vf{x, x, x, x}; }
static inline vf vzero() { return vf{0, 0, 0, 0}; }
static inline vf vload(const float* p) {
  vf x;
  memcpy(&x, p, 16);
  return x;
}
static inline void vstore(float* p, vf x) { memcpy(p, &x, 16); }
static inline vi vloadi(const void* p) {
  vi x;
  memcpy(&x, p, 16);
  return x;
}
static inline vi vseti(int32_t x) { return vi{x, x, x, x}; }
static inline void vstorei(void* p, vi x) { memcpy(p, &x, 16); }
static inline vf vadd(vf a, vf b) { return a + b; }
static inline vf vsub(vf a, vf b) { return a - b; }
static inline vf vmul(vf a, vf b) { return a * b; }
static inline vf vdiv(vf a, vf b) { return a / b; }
static inline vf vfma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline vf vmin(vf a, vf b) { return a < b ? a : b; }
static inline vf vround(vf a) {
  vf r;
  for (int i = 0; i < W; ++i) r[i] = __builtin_rintf(a[i]);
  return r;
}
static inline vf vscale2(vf a, vf n) {
  vf r;
  for (int i = 0; i < W; ++i) r[i] = a[i] * bits_float((uint32_t)((int)n[i] + 127) << 23);
  return r;
}
static inline float vsum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
static inline float vpeak(vf a) {
  float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
static inline float vfirst(vf a) { return a[0]; }
static inline bool vabove(vf a, vf b) {
  vi above = a > b;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
}
static inline vf vabs(vf a) { return vmax(a, -a); }
static inline vf vlow(vi a) { return (vf)((vi)((__attribute__((vector_size(16))) uint32_t)a << 16)); }
static inline vf vhigh(vi a) { return (vf)(a & vseti((int32_t)0xffff0000u)); }
static inline vf vfromi(vi a) { return vf{(float)a[0], (float)a[1], (float)a[2], (float)a[3]}; }
template <int J> static inline vf vbyte(vi a) {
  vf r;
  for (int i = 0; i < W; ++i) r[i] = (float)(int8_t)((uint32_t)a[i] >> (8 * J));
  return r;
}
template <int J> static inline vf vnibble(vi a) {
  vf r;
  for (int i = 0; i < W; ++i) r[i] = (float)((int32_t)((uint32_t)a[i] << (28 - 4 * J)) >> 28);
  return r;
}
template <int J> static inline vf ve2m1(vi a) {
  const float table[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  vf r;
  for (int i = 0; i < W; ++i) r[i] = table[(uint32_t)a[i] >> (4 * J) & 15];
  return r;
}
static inline vf vload_power(const uint8_t* p) {  // 2^(p - 127)
  vf r;
  for (int i = 0; i < W; ++i) r[i] = bits_float(p[i] ? (uint32_t)p[i] << 23 : 0x00400000u);
  return r;
}
static inline vf vload_bf16(const uint16_t* p) {
  return vf{bf16_float(p[0]), bf16_float(p[1]), bf16_float(p[2]), bf16_float(p[3])};
}
static inline void vstore_bf16(uint16_t* p, vf x) {
  for (int i = 0; i < W; ++i) p[i] = float_bf16(x[i]);
}
static inline vf vload_half(const uint16_t* p) {
  return vf{half_float(p[0]), half_float(p[1]), half_float(p[2]), half_float(p[3])};
}
static inline void vstore_half(uint16_t* p, vf x) {
  for (int i = 0; i < W; ++i) p[i] = float_half(x[i]);
}

#endif

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
static inline void prefetch_to_write(void* p) { __builtin_prefetch(p, 1, 3); }

// 2^x for x <= 127, relative error below 3e-7; zero far below -126 (at once below it, except by AVX-512).
static inline vf vexp2(vf x) {
#if defined(KVLOOM_AVX512)
  // Degree 5 on [0, 1), minimax in the relative error; the scaling instruction takes the floor of x itself. For -inf the
  // reduced argument is 0 and the scaling gives 0.
  vf f = _mm512_reduce_ps(x, 1);  // x less that integer
  vf r = vset(1.877573861e-3f);
  r = vfma(r, f, vset(8.989346901e-3f));
  r = vfma(r, f, vset(5.582631234e-2f));
  r = vfma(r, f, vset(2.401536190e-1f));
  r = vfma(r, f, vset(6.931530730e-1f));
  r = vfma(r, f, vset(0.9999999251f));
  return _mm512_scalef_ps(r, x);
#else
  // Degree 6 on [-1/2, 1/2]: Taylor at 0 of exp(x ln 2), coefficients ln(2)^k / k!.
  vf low = vset(-126.0f);
  vf clamped = vmax(x, low);
  vf n = vround(clamped);
  vf f = vsub(clamped, n);
  vf r = vset(1.5403530e-4f);
  r = vfma(r, f, vset(1.3333558e-3f));
  r = vfma(r, f, vset(9.6181291e-3f));
  r = vfma(r, f, vset(5.5504109e-2f));
  r = vfma(r, f, vset(2.4022651e-1f));
  r = vfma(r, f, vset(6.9314718e-1f));
  r = vfma(r, f, vset(1.0f));
  r = vscale2(r, n);
#if defined(KVLOOM_AVX2)
  return _mm256_and_ps(r, _mm256_cmp_ps(x, low, _CMP_GE_OQ));
#else
  return (vf)((vi)r & (x >= low));
#endif
#endif
}

// tanh by 1 - 2 / (1 + e^2x); absolute error below 1e-6.
static inline vf vtanh(vf x) {
  vf bounded = vmax(vmin(x, vset(15.0f)), vset(-15.0f));
  vf e = vexp2(vmul(bounded, vset(2.8853900818f)));
  return vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f))));
}

}  // namespace KVLOOM_ISA
