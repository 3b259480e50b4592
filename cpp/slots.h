// Reading, writing and moving single slots, and encoding whole blocks, for whoever must not know how a block lies inside.
#pragma once

#include "attention.h"

namespace kvloom {

// N slots, each given by the address of its block (granules) and its place in it.
struct Slots {
  char* arena = nullptr;
  Store store = Store::kFloat;
  int block_size = 0, k_width = 0, v_width = 0;  // of heads; blocks hold `block_width` of them
};

// k [N, k_width], v [N, v_width] of `element`, row-major.
void write_slots(const Slots& slots, const int32_t* address, const int32_t* within, int n, Element element,
                 const void* k, const void* v);
void read_slots(const Slots& slots, const int32_t* address, const int32_t* within, int n, Element element, void* k,
                void* v);
// Move encoded slots from -> to without decoding. Run r is moves start[r] .. start[r + 1] - 1, done in order by one
// thread, so a lane may be compacted onto itself; different runs must not touch the same slots.
void copy_slots(const Slots& slots, const int32_t* from, const int32_t* from_within, const int32_t* to,
                const int32_t* to_within, const int32_t* start, int num_runs);

// Encode the whole blocks at `from` [N], of the native store that `slots` names, into those at `to` [N] in `to_store`,
// by the whole team. No block is in both.
void encode_blocks(const Slots& slots, Store to_store, const int32_t* from, const int32_t* to, int n);

}  // namespace kvloom
