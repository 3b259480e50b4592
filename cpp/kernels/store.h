// How K and V of a lane are stored: a store has a K side and a V side, and a block lies as they say.
//
//   block   | K codes [k_width / per][P][per] | V codes [P / per][v_width][per] | K scales [P] | V scales [P] |
//
// `per` is that of each side. Scales are float32, one per slot, and only of sides that have them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kvloom {

enum class Element : int { kFloat = 0, kBf16 = 1, kHalf = 2, kInt8 = 3 };

struct Side {
  Element element;
  int per;      // elements of one row of the product that lie together
  int bytes;    // of an element
  bool scaled;  // a scale per slot follows the codes
};

constexpr Side side_of(Element e) {
  return {e, e == Element::kBf16 ? 2 : e == Element::kInt8 ? 4 : 1,
          e == Element::kFloat ? 4 : e == Element::kInt8 ? 1 : 2, e == Element::kInt8};
}

enum class Store : int { kFloat = 0, kBf16 = 1, kHalf = 2, kInt8 = 3 };

struct Sides {
  Side k, v;
};

constexpr Sides sides_of(Store s) {
  switch (s) {
    case Store::kFloat: return {side_of(Element::kFloat), side_of(Element::kFloat)};
    case Store::kBf16: return {side_of(Element::kBf16), side_of(Element::kBf16)};
    case Store::kHalf: return {side_of(Element::kHalf), side_of(Element::kHalf)};
    case Store::kInt8: break;
  }
  return {side_of(Element::kInt8), side_of(Element::kInt8)};
}
constexpr Side k_side(Store s) { return sides_of(s).k; }
constexpr Side v_side(Store s) { return sides_of(s).v; }

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
