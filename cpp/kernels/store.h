// How K and V of a lane are stored: a store has a K side and a V side, and a block lies as they say.
//
//   block   | K codes [k_width / per][P][per] | V codes [P / per][v_width][per] | K scales [P] | V scales [P] |
//
// `per` is that of each side. Scales are float32, one per slot, and only of sides that have them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kvloom {

enum class Element : int { kFloat = 0, kBf16 = 1, kHalf = 2, kInt8 = 3, kE4m3 = 4 };

struct Side {
  Element element;
  int per;      // elements of one row of the product that lie together
  int bytes;    // of an element
  bool scaled;  // a scale per slot follows the codes
};

constexpr Side side_of(Element e) {
  switch (e) {
    case Element::kFloat: return {e, 1, 4, false};
    case Element::kBf16: return {e, 2, 2, false};
    case Element::kHalf: return {e, 1, 2, false};
    case Element::kInt8:
    case Element::kE4m3: break;
  }
  return {e, 4, 1, true};
}

enum class Store : int { kFloat = 0, kBf16 = 1, kHalf = 2, kInt8 = 3, kE4m3 = 4 };

struct NamedStore {
  const char* name;
  Store store;
  Element k, v;
};

constexpr NamedStore kStores[] = {
    {"fp32", Store::kFloat, Element::kFloat, Element::kFloat}, {"bf16", Store::kBf16, Element::kBf16, Element::kBf16},
    {"fp16", Store::kHalf, Element::kHalf, Element::kHalf},    {"int8", Store::kInt8, Element::kInt8, Element::kInt8},
    {"fp8_e4m3", Store::kE4m3, Element::kE4m3, Element::kE4m3},
};
constexpr Side k_side(Store s) { return side_of(kStores[(int)s].k); }
constexpr Side v_side(Store s) { return side_of(kStores[(int)s].v); }

// Elements whose values bf16 holds exactly, so that products may be of bf16.
constexpr bool exact_in_bf16(Element e) { return e != Element::kFloat && e != Element::kHalf; }
constexpr bool exact_in_bf16(Store s) { return exact_in_bf16(k_side(s).element) && exact_in_bf16(v_side(s).element); }

// Bytes from the start of a block of P slots to what a slot has there.
struct BlockLayout {
  Side k, v;
  int block_size, k_width, v_width;  // P; widths in the block

  constexpr BlockLayout(Store store, int slots, int k_elements, int v_elements)
      : k(k_side(store)), v(v_side(store)), block_size(slots), k_width(k_elements), v_width(v_elements) {}

  constexpr size_t k_unit() const { return (size_t)k.per * k.bytes; }
  constexpr size_t v_unit() const { return (size_t)v.per * v.bytes; }
  constexpr size_t k_row() const { return block_size * k_unit(); }  // between the rows of a slot's key
  constexpr size_t v_row() const { return v_width * v_unit(); }     // between the rows of a group's values
  constexpr size_t k_bytes() const { return (size_t)block_size * k_width * k.bytes; }
  constexpr size_t v_bytes() const { return (size_t)block_size * v_width * v.bytes; }
  constexpr size_t key(int within) const { return within * k_unit(); }
  constexpr size_t value(int within) const {
    return k_bytes() + within / v.per * v_row() + (size_t)(within % v.per) * v.bytes;
  }
  constexpr size_t k_scale(int within) const { return k_bytes() + v_bytes() + (size_t)within * 4; }
  constexpr size_t v_scale(int within) const { return k_scale(within) + (k.scaled ? (size_t)block_size * 4 : 0); }
};

}  // namespace kvloom
