// Register-tile products of panels in four bits, int4 and MXFP4:
// C[m, n] = sum_g (scale[g, n] sum_k A[m, k] code[k, n] + offset[g, n] sum_k A[m, k]), k over the 32 inputs of group g.
//
//   panel | group 0: codes of 32 x 32, 32 scales, 32 offsets | group 1 | ...
//
// MXFP4's rows have no offsets and one byte a scale. Codes are multiplied as they are and summed in each group; scales and
// offsets are applied once a group. Groups are added in order: a result depends on neither the number of rows nor threads.
#pragma once

#include "kernels.h"
#include "tile.h"

namespace KVLOOM_ISA {

using namespace kvloom;

struct Int4ByBf16 {
  static constexpr int kABytes = 2, kRowBytes = kInt4RowBytes;
  static constexpr bool kOffset = true;
};
struct Int4ByF32 {
  static constexpr int kABytes = 4, kRowBytes = kInt4RowBytes;
  static constexpr bool kOffset = true;
};
struct Mxfp4ByBf16 {
  static constexpr int kABytes = 2, kRowBytes = kMxfp4RowBytes;
  static constexpr bool kOffset = false;
};
struct Mxfp4ByF32 {
  static constexpr int kABytes = 4, kRowBytes = kMxfp4RowBytes;
  static constexpr bool kOffset = false;
};

// One panel, the sums of its activations [group][12], and what to prefetch, `ahead_bytes` a group, or null.
struct Int4Panel {
  const char* data;
  const float* sums;
  const char* ahead;
  int num_segments;
  int segment_groups;
  size_t ahead_bytes;
};

// Pairs<Kind>: `b<J>` takes inputs 2 J and 2 J + 1 of eight from a vector of codes, `a` the same of a row of A.
template <class Kind> struct Pairs {
  struct A { vf x0, x1; };
  struct B { vf x0, x1; };
  static inline A a(const char* p) {
    if (Kind::kABytes == 4) return {vset(float_at(p)), vset(float_at(p + 4))};
    vi x = vseti(unit_at(p));
    return {vlow(x), vhigh(x)};
  }
  template <int J> static inline B b(vi codes) {
    if constexpr (Kind::kOffset)
      return {vnibble<J>(codes), vnibble<J + 4>(codes)};
    else
      return {ve2m1<J>(codes), ve2m1<J + 4>(codes)};
  }
  static inline vf dot(vf acc, A a, B b) { return vfma(a.x1, b.x1, vfma(a.x0, b.x0, acc)); }
};
#if defined(KVLOOM_BF16)
template <> struct Pairs<Int4ByBf16> : Dot<WeightBf16> {
  // Small integers are exact in bf16. A lookup uses five bits of each half, so the table holds each value twice.
  template <int J> static inline B b(vi codes) {
    const vi table = _mm512_set_epi16(
        (short)0xbf80, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0,
        (short)0xc100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, (short)0xbf80, (short)0xc000,
        (short)0xc040, (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0, (short)0xc100, 0x40e0, 0x40c0,
        0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0);
    return {_mm512_permutexvar_epi16(J == 0 ? codes : _mm512_srli_epi16(codes, 4 * J), table)};
  }
};
template <> struct Pairs<Mxfp4ByBf16> : Dot<WeightBf16> {
  template <int J> static inline B b(vi codes) {
    const vi table = _mm512_set_epi16(
        (short)0xc0c0, (short)0xc080, (short)0xc040, (short)0xc000, (short)0xbfc0, (short)0xbf80, (short)0xbf00,
        (short)0x8000, 0x40c0, 0x4080, 0x4040, 0x4000, 0x3fc0, 0x3f80, 0x3f00, 0, (short)0xc0c0, (short)0xc080,
        (short)0xc040, (short)0xc000, (short)0xbfc0, (short)0xbf80, (short)0xbf00, (short)0x8000, 0x40c0, 0x4080,
        0x4040, 0x4000, 0x3fc0, 0x3f80, 0x3f00, 0);
    return {_mm512_permutexvar_epi16(J == 0 ? codes : _mm512_srli_epi16(codes, 4 * J), table)};
  }
};
#endif

template <class Kind, int J, int MR, int V>
__attribute__((always_inline)) static inline void int4_step(const char* row, const vi* codes, vf (*acc)[V]) {
  typename Pairs<Kind>::B b[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) b[v] = Pairs<Kind>::template b<J>(codes[v]);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    typename Pairs<Kind>::A a = Pairs<Kind>::a(row + m * kRowBytes + 2 * J * Kind::kABytes);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = Pairs<Kind>::dot(acc[m][v], a, b[v]);
  }
}

// MR rows by 16 NV columns from column `column` of the panel on, into c[MR, 32].
template <class Kind, int MR, int NV, bool Ahead>
static inline void int4_tile(const char* a, size_t a_segment, const Int4Panel& panel, int column, const float* sums,
                             float* c) {
  constexpr int V = NV * (16 / W);
  constexpr bool kHeld = MR * V <= 12;  // sums of groups stay in registers
  vf total[kHeld ? MR : 1][V];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      if (kHeld)
        total[kHeld ? m : 0][v] = vzero();
      else
        vstore(c + m * kPanelColumns + v * W, vzero());
    }
  const char* data = panel.data;
  const char* ahead = panel.ahead;
  const size_t ahead_bytes = panel.ahead_bytes;
  const int groups = panel.segment_groups;
  for (int s = 0; s < panel.num_segments; ++s) {
    const char* row = a + s * a_segment;
    for (int g = 0; g < groups; ++g) {
      vf acc[MR][V];
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[m][v] = vzero();
      for (int u = 0; u < kInt4Group / 8; ++u) {
        vi codes[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) codes[v] = vloadi(data + (u * kPanelColumns + column + v * W) * 4);
        int4_step<Kind, 0, MR, V>(row, codes, acc);
        int4_step<Kind, 1, MR, V>(row, codes, acc);
        int4_step<Kind, 2, MR, V>(row, codes, acc);
        int4_step<Kind, 3, MR, V>(row, codes, acc);
        row += 8 * Kind::kABytes;
      }
      if (Ahead) {
        if (ahead_bytes == Kind::kRowBytes) {
#pragma GCC unroll 16
          for (size_t i = 0; i < Kind::kRowBytes; i += 64) prefetch(ahead + i);
        } else {
          for (size_t i = 0; i < ahead_bytes; i += 64) prefetch(ahead + i);
        }
        ahead += ahead_bytes;
      }
      // Without this barrier the compiler copies sums that are not held to the stack at every group.
      if (!kHeld) __asm__ volatile("" : : "r"(c) : "memory");
      const uint16_t* scale = (const uint16_t*)(data + kInt4CodeBytes) + column;
      const uint8_t* exponent = (const uint8_t*)(data + kInt4CodeBytes) + column;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const vf by = Kind::kOffset ? vload_half(scale + v * W) : vload_power(exponent + v * W);
        const vf offset = Kind::kOffset ? vload_half(scale + kPanelColumns + v * W) : vzero();
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          float* at = c + m * kPanelColumns + v * W;
          vf before = kHeld ? total[kHeld ? m : 0][v] : vload(at);
          vf after = vfma(acc[m][v], by, Kind::kOffset ? vfma(vset(sums[m]), offset, before) : before);
          if (kHeld)
            total[kHeld ? m : 0][v] = after;
          else
            vstore(at, after);
        }
      }
      if (Kind::kOffset) sums += kTileRows;
      data += Kind::kRowBytes;
    }
  }
  if (kHeld)
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) vstore(c + m * kPanelColumns + v * W, total[kHeld ? m : 0][v]);
}

template <class Kind, bool Ahead>
static inline void int4_rows(int rows, const char* a, size_t a_segment, const Int4Panel& panel, float* c) {
#if defined(KVLOOM_AVX512)
  switch (rows) {
#define KVLOOM_ROWS(n) \
  case n: return int4_tile<Kind, n, 2, Ahead>(a, a_segment, panel, 0, panel.sums, c);
    KVLOOM_ROWS(1) KVLOOM_ROWS(2) KVLOOM_ROWS(3) KVLOOM_ROWS(4) KVLOOM_ROWS(5) KVLOOM_ROWS(6)
    KVLOOM_ROWS(7) KVLOOM_ROWS(8) KVLOOM_ROWS(9) KVLOOM_ROWS(10) KVLOOM_ROWS(11) KVLOOM_ROWS(12)
#undef KVLOOM_ROWS
  }
#else
  // Sixteen registers: two rows by 16 columns at a time; later passes find the panel in the first-level cache.
  for (int column = 0; column < kPanelColumns; column += 16)
    for (int m = 0; m < rows; m += 2) {
      const char* from = a + m * kRowBytes;
      float* to = c + m * kPanelColumns + column;
      const float* own_sums = Kind::kOffset ? panel.sums + m : nullptr;
      const bool first = Ahead && m == 0 && column == 0;
      if (m + 1 == rows && first)
        int4_tile<Kind, 1, 1, true>(from, a_segment, panel, column, own_sums, to);
      else if (m + 1 == rows)
        int4_tile<Kind, 1, 1, false>(from, a_segment, panel, column, own_sums, to);
      else if (first)
        int4_tile<Kind, 2, 1, true>(from, a_segment, panel, column, own_sums, to);
      else
        int4_tile<Kind, 2, 1, false>(from, a_segment, panel, column, own_sums, to);
    }
#endif
}

// C[rows, 32] = A times the panel. `a_segment` is the distance between the A slices of consecutive segments, in bytes.
template <class Kind>
static inline void int4_product(int rows, const char* a, size_t a_segment, const Int4Panel& panel, float* c) {
  if (panel.ahead)
    int4_rows<Kind, true>(rows, a, a_segment, panel, c);
  else
    int4_rows<Kind, false>(rows, a, a_segment, panel, c);
}

}  // namespace KVLOOM_ISA
