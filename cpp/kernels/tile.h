// Register-tile products: C[m, n] (+)= sum_k A[m, k] * B[k, n] for up to 12 rows and 16 or 32 columns.
//
// A tile is row-major with a fixed row stride of kRowBytes, so that all rows have constant offsets.
// B comes in rows of `kPer` consecutive k for 16 columns: [k / kPer][16][kPer]. That one layout holds packed weights
// (32-column panels), keys (columns are tokens) and values (k are tokens), so decode, prefill and linear layers share
// this file. Each output is summed over k in one fixed order: it depends on neither the number of rows nor threads.
#pragma once

#include "codes.h"

namespace KVLOOM_ISA {

constexpr int kMaxRows = 12;
constexpr size_t kSliceBytes = 1536;  // bytes of k per row of an A tile
constexpr size_t kRowBytes = 1600;    // an odd number of cache lines, so rows are in different cache sets

struct WeightBf16 {  // pairs of bf16, both sides
  static constexpr int kPer = 2, kABytes = 2, kBBytes = 2;
};
struct WeightF32 {
  static constexpr int kPer = 1, kABytes = 4, kBBytes = 4;
};
struct HalfByF32 {  // B in IEEE half, A in float
  static constexpr int kPer = 1, kABytes = 4, kBBytes = 2;
};
struct Bf16ByF32 {  // B in bf16 pairs, A in float
  static constexpr int kPer = 2, kABytes = 4, kBBytes = 2;
};
template <class Code> struct CodesByBf16 {  // B in quads of codes, A in bf16; the caller applies scales
  static constexpr int kPer = 4, kABytes = 2, kBBytes = 1;
};
template <class Code> struct CodesByF32 {
  static constexpr int kPer = 4, kABytes = 4, kBBytes = 1;
};
using Int8ByBf16 = CodesByBf16<Int8Code>;
using Int8ByF32 = CodesByF32<Int8Code>;
using E4m3ByBf16 = CodesByBf16<E4m3Code>;
using E4m3ByF32 = CodesByF32<E4m3Code>;
struct Int8ByInt8 {  // integer product, accumulated exactly in int32; C holds int32 bits
  static constexpr int kPer = 4, kABytes = 1, kBBytes = 1;
};
// What is added to the codes of A in Int8ByInt8: VNNI multiplies signed bytes by unsigned ones.
#if defined(KVLOOM_BF16)
constexpr int kCodeOffset = 128;
#else
constexpr int kCodeOffset = 0;
#endif

static inline int32_t unit_at(const char* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}
static inline float float_at(const char* p) {
  float x;
  memcpy(&x, p, 4);
  return x;
}

// dot<Kind>(acc, a, b): add to acc[W columns] the kPer products of one B row; `a` points at the row's kPer elements.
template <class Kind> struct Dot;

template <> struct Dot<WeightF32> {
  struct A { vf x; };
  struct B { vf x; };
  static inline A a(const char* p) { return {vset(float_at(p))}; }
  static inline B b(const char* p) { return {vload((const float*)p)}; }
  static inline vf dot(vf acc, A a, B b) { return vfma(a.x, b.x, acc); }
};
template <> struct Dot<HalfByF32> {
  struct A { vf x; };
  struct B { vf x; };
  static inline A a(const char* p) { return {vset(float_at(p))}; }
  static inline B b(const char* p) { return {vload_half((const uint16_t*)p)}; }
  static inline vf dot(vf acc, A a, B b) { return vfma(a.x, b.x, acc); }
};
template <> struct Dot<Bf16ByF32> {
  struct A { vf x0, x1; };
  struct B { vf x0, x1; };
  static inline A a(const char* p) { return {vset(float_at(p)), vset(float_at(p + 4))}; }
  static inline B b(const char* p) {
    vi x = vloadi(p);
    return {vlow(x), vhigh(x)};
  }
  static inline vf dot(vf acc, A a, B b) { return vfma(a.x1, b.x1, vfma(a.x0, b.x0, acc)); }
};
template <class Code> struct Dot<CodesByF32<Code>> {
  struct A { vf x0, x1, x2, x3; };
  struct B { vf x0, x1, x2, x3; };
  static inline A a(const char* p) {
    return {vset(float_at(p)), vset(float_at(p + 4)), vset(float_at(p + 8)), vset(float_at(p + 12))};
  }
  static inline B b(const char* p) {
    vi x = vloadi(p);
    return {Code::template byte<0>(x), Code::template byte<1>(x), Code::template byte<2>(x), Code::template byte<3>(x)};
  }
  static inline vf dot(vf acc, A a, B b) {
    return vfma(a.x3, b.x3, vfma(a.x2, b.x2, vfma(a.x1, b.x1, vfma(a.x0, b.x0, acc))));
  }
};

#if defined(KVLOOM_BF16)
template <> struct Dot<WeightBf16> {
  struct A { vi x; };
  struct B { vi x; };
  static inline A a(const char* p) { return {vseti(unit_at(p))}; }
  static inline B b(const char* p) { return {vloadi(p)}; }
  static inline vf dot(vf acc, A a, B b) { return _mm512_dpbf16_ps(acc, (__m512bh)a.x, (__m512bh)b.x); }
};
template <class Code> struct Dot<CodesByBf16<Code>> {
  struct A { vi x0, x1; };
  struct B { vi x0, x1; };
  static inline A a(const char* p) { return {vseti(unit_at(p)), vseti(unit_at(p + 4))}; }
  static inline vi pair(vf low, vf high) {  // values of codes are exact in bf16: the lower halves are zero
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                   _mm512_castps_si512(high));
  }
  static inline B b(const char* p) {
    vi x = vloadi(p);
    return {pair(Code::template byte<0>(x), Code::template byte<1>(x)),
            pair(Code::template byte<2>(x), Code::template byte<3>(x))};
  }
  static inline vf dot(vf acc, A a, B b) {
    acc = _mm512_dpbf16_ps(acc, (__m512bh)a.x0, (__m512bh)b.x0);
    return _mm512_dpbf16_ps(acc, (__m512bh)a.x1, (__m512bh)b.x1);
  }
};
#else
template <> struct Dot<WeightBf16> {
  struct A { vf x0, x1; };
  struct B { vf x0, x1; };
  static inline A a(const char* p) {
    vi x = vseti(unit_at(p));
    return {vlow(x), vhigh(x)};
  }
  static inline B b(const char* p) {
    vi x = vloadi(p);
    return {vlow(x), vhigh(x)};
  }
  static inline vf dot(vf acc, A a, B b) { return vfma(a.x1, b.x1, vfma(a.x0, b.x0, acc)); }
};
template <class Code> struct Dot<CodesByBf16<Code>> {
  struct A { vf x0, x1, x2, x3; };
  typedef typename Dot<CodesByF32<Code>>::B B;
  static inline A a(const char* p) {
    vi x = vseti(unit_at(p)), y = vseti(unit_at(p + 4));
    return {vlow(x), vhigh(x), vlow(y), vhigh(y)};
  }
  static inline B b(const char* p) { return Dot<CodesByF32<Code>>::b(p); }
  static inline vf dot(vf acc, A a, B b) {
    return vfma(a.x3, b.x3, vfma(a.x2, b.x2, vfma(a.x1, b.x1, vfma(a.x0, b.x0, acc))));
  }
};
#endif

#if defined(KVLOOM_BF16)
template <> struct Dot<Int8ByInt8> {
  struct A { vi x; };
  struct B { vi x; };
  static inline A a(const char* p) { return {vseti(unit_at(p))}; }
  static inline B b(const char* p) { return {vloadi(p)}; }
  static inline vf dot(vf acc, A a, B b) {
    return _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(acc), a.x, b.x));
  }
};
#elif defined(KVLOOM_AVX512)
// Here and for AVX2, B's magnitudes times A with B's signs: 16-bit sums of two are exact for A in [-127, 127] and B in
// [-128, 127], because 2 * 127 * 128 < 2^15.
template <> struct Dot<Int8ByInt8> {
  struct A { vi x; };
  struct B { vi size; __mmask64 negative; };
  static inline A a(const char* p) { return {vseti(unit_at(p))}; }
  static inline B b(const char* p) {
    vi x = vloadi(p);
    return {_mm512_abs_epi8(x), _mm512_movepi8_mask(x)};
  }
  static inline vf dot(vf acc, A a, B b) {
    vi with_sign = _mm512_mask_sub_epi8(a.x, b.negative, _mm512_setzero_si512(), a.x);
    vi sums = _mm512_madd_epi16(_mm512_maddubs_epi16(b.size, with_sign), _mm512_set1_epi16(1));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(acc), sums));
  }
};
#elif defined(KVLOOM_AVX2)
template <> struct Dot<Int8ByInt8> {
  struct A { vi x; };
  struct B { vi size, x; };
  static inline A a(const char* p) { return {vseti(unit_at(p))}; }
  static inline B b(const char* p) {
    vi x = vloadi(p);
    return {_mm256_abs_epi8(x), x};
  }
  static inline vf dot(vf acc, A a, B b) {
    vi sums = _mm256_madd_epi16(_mm256_maddubs_epi16(b.size, _mm256_sign_epi8(a.x, b.x)), _mm256_set1_epi16(1));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(acc), sums));
  }
};
#else
template <> struct Dot<Int8ByInt8> {
  struct A { vi x0, x1, x2, x3; };
  typedef A B;
  template <int J> static inline vi byte(vi x) {
    return (vi)((__attribute__((vector_size(16))) uint32_t)x << (24 - 8 * J)) >> 24;
  }
  static inline A split(vi x) { return {byte<0>(x), byte<1>(x), byte<2>(x), byte<3>(x)}; }
  static inline A a(const char* p) { return split(vseti(unit_at(p))); }
  static inline B b(const char* p) { return split(vloadi(p)); }
  static inline vf dot(vf acc, A a, B b) {
    return (vf)((vi)acc + a.x0 * b.x0 + a.x1 * b.x1 + a.x2 * b.x2 + a.x3 * b.x3);
  }
};
#endif

// Addresses of the columns of B. `column[s * NV + v]` is the first row of segment s for 16-column group v; consecutive
// rows are `row_bytes` apart. `ahead` has the same shape: rows to prefetch while these are used, or null.
struct Columns {
  const char* const* column;
  const char* const* ahead;
  int num_segments;
  int num_rows;
  size_t row_bytes;
  size_t ahead_bytes;  // distance between the rows to prefetch
};

template <class Kind, int MR, int NV, bool Ahead>
static inline void tile_product(const char* a, size_t a_segment, const Columns& b, float* c, size_t c_stride, bool add) {
  constexpr int R = 16 / W;  // vectors in 16 columns
  constexpr int kStep = Kind::kPer * Kind::kABytes;
  constexpr int kVecBytes = W * Kind::kPer * Kind::kBBytes;
  vf acc[MR][NV * R];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV * R; ++v) acc[m][v] = add ? vload(c + m * c_stride + v * W) : vzero();
  for (int s = 0; s < b.num_segments; ++s) {
    const char* row = a + s * a_segment;
    const char* col[NV];
    const char* next[NV];
    for (int v = 0; v < NV; ++v) {
      col[v] = b.column[s * NV + v];
      next[v] = Ahead ? b.ahead[s * NV + v] : nullptr;
    }
    size_t at = 0, at_next = 0;  // one offset for all columns: fewer additions than a pointer for each
#pragma GCC unroll 2
    for (int i = 0; i < b.num_rows; ++i) {
      typename Dot<Kind>::B bv[NV * R];
#pragma GCC unroll 16
      for (int v = 0; v < NV * R; ++v) bv[v] = Dot<Kind>::b(col[v / R] + at + (v % R) * kVecBytes);
      if (Ahead) {
        for (int v = 0; v < NV; ++v) prefetch(next[v] + at_next);
        at_next += b.ahead_bytes;
      }
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        typename Dot<Kind>::A av = Dot<Kind>::a(row + m * kRowBytes);
#pragma GCC unroll 16
        for (int v = 0; v < NV * R; ++v) acc[m][v] = Dot<Kind>::dot(acc[m][v], av, bv[v]);
      }
      row += kStep;
      at += b.row_bytes;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < NV * R; ++v) vstore(c + m * c_stride + v * W, acc[m][v]);
}

// The first `rows`, but at most MR, of 16 columns.
template <class Kind, int MR, bool Ahead>
static inline void up_to(int rows, const char* a, size_t a_segment, const Columns& b, float* c, size_t c_stride, bool add) {
  if constexpr (MR > 1) {
    if (rows < MR) return up_to<Kind, MR - 1, Ahead>(rows, a, a_segment, b, c, c_stride, add);
  }
  tile_product<Kind, MR, 1, Ahead>(a, a_segment, b, c, c_stride, add);
}

template <class Kind, int NV, bool Ahead>
static inline void rows_product(int rows, const char* a, size_t a_segment, const Columns& b, float* c, size_t c_stride,
                                bool add) {
#if defined(KVLOOM_AVX512)
  switch (rows) {
#define KVLOOM_ROWS(n) \
  case n: return tile_product<Kind, n, NV, Ahead>(a, a_segment, b, c, c_stride, add);
    KVLOOM_ROWS(1) KVLOOM_ROWS(2) KVLOOM_ROWS(3) KVLOOM_ROWS(4) KVLOOM_ROWS(5) KVLOOM_ROWS(6)
  }
  if constexpr (NV <= 2) switch (rows) {
    KVLOOM_ROWS(7) KVLOOM_ROWS(8) KVLOOM_ROWS(9) KVLOOM_ROWS(10) KVLOOM_ROWS(11) KVLOOM_ROWS(12)
#undef KVLOOM_ROWS
  }
#else
  // Sixteen registers: a few rows by 16 columns at a time; a later pass finds B in the first-level cache. Eight sums hide
  // the latency of an addition, hence four rows, and 32 columns of a single row.
#if defined(KVLOOM_AVX2)
  constexpr int kRows = 4;
  if constexpr (NV == 2)
    if (rows == 1) return tile_product<Kind, 1, NV, Ahead>(a, a_segment, b, c, c_stride, add);
#else
  constexpr int kRows = 2;
#endif
  for (int v = 0; v < NV; ++v) {
    const char* column[64];
    const char* ahead[64];
    for (int s = 0; s < b.num_segments; ++s) {
      column[s] = b.column[s * NV + v];
      if (Ahead) ahead[s] = b.ahead[s * NV + v];
    }
    Columns one = {column, ahead, b.num_segments, b.num_rows, b.row_bytes, b.ahead_bytes};
    for (int m = 0; m < rows; m += kRows) {
      const char* from = a + m * kRowBytes;
      float* to = c + m * c_stride + 16 * v;
      if (m == 0)
        up_to<Kind, kRows, Ahead>(rows - m, from, a_segment, one, to, c_stride, add);
      else
        up_to<Kind, kRows, false>(rows - m, from, a_segment, one, to, c_stride, add);
    }
  }
#endif
}

// C[rows, 16 NV] (+)= A B. `a_segment` is the distance between the A slices of consecutive segments, in bytes.
template <class Kind, int NV>
static inline void product(int rows, const char* a, size_t a_segment, const Columns& b, float* c, size_t c_stride,
                           bool add) {
  if (b.ahead)
    rows_product<Kind, NV, true>(rows, a, a_segment, b, c, c_stride, add);
  else
    rows_product<Kind, NV, false>(rows, a, a_segment, b, c, c_stride, add);
}

}  // namespace KVLOOM_ISA
