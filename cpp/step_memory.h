// Memory of steps: it persists between them and grows with the batch.
#pragma once

#include <vector>

#include "huge_allocator.h"
#include "parts.h"

namespace kvloom {

struct StepMemory {
  template <class T> using Buffer = std::vector<T, HugeAllocator<T>>;
  // Inputs of one product at a time.
  struct Inputs {
    Buffer<char> data;
    Buffer<float> scale;

    void reserve(Product product, int rows, int k);
    // Tiles of `rows` rows in memory for `longest`; the tiling does not depend on `rows`.
    Tiles tiles(Product product, int longest, int rows, int k);
  };

  Buffer<float> x, qkv, branch, wide, cos_sin, logits;
  Inputs normal, attended, inner, output;
  // Per thread, batch of one.
  std::vector<std::vector<char>> own_tiles;
  std::vector<std::vector<float>> own_row;
  std::vector<float> own_scale;
  Workspace workspace;
  ExpertsMemory experts;

  // Make room for steps of `model` over `num_tokens` tokens, of which `longest` at a time, with `num_logits` rows of
  // logits that the caller does not keep.
  void reserve(const DecoderModel& model, int num_tokens, int longest, int num_output_rows, int num_logits,
               int num_threads);
  // The input of a product over a batch of one, in memory of that thread alone.
  Tiles own(int thread, Product product, int k);
  // Commit the pages of the buffers that `reserve` allocated.
  void make_pages();
};

// Padding between the last element of rows [begin, end) and the end of their last slice is multiplied by zero weights; it
// must be finite.
void clear_padding(const Tiles& tiles, int begin, int end);

}  // namespace kvloom
