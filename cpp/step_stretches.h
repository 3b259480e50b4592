// A long step, cut into stretches of tokens that every layer takes one after another: what lies between two operations
// then stays in the caches, and the memory for it does not grow with the step.
//
//   tokens     | sequence 0 ............................. | sequence 1 .... | 2 | 3 ....... |
//   stretches  |           |           |           |                |                       |
//
// A sequence is cut between two blocks of query rows only, so that its results do not depend on where the cuts fall.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.h"

namespace kvloom {

// What a batch of part of a step points to.
struct BatchPart {
  std::vector<int32_t> cu_seqlens = {0}, seq_rows, later, in_step;

  // Sequence `b` of `whole` with its tokens [begin, end) only, counted as those of `whole` are.
  void add(const Batch& whole, int b, int begin, int end);
  Batch batch() const;  // good until the next `add`
};

struct Stretch {
  int first;  // token of the step
  Batch batch;
};

class Stretches {
 public:
  static constexpr int kTokens = 512;                    // of a stretch, about
  static constexpr int kUncut = kTokens + kTokens / 2;  // tokens of the longest step that is one stretch

  // Sequences are cut at multiples of `block` tokens from their first in the step. `batch` must outlive this.
  Stretches(const Batch& batch, int block);
  int size() const { return static_cast<int>(stretches_.size()); }
  int longest() const { return longest_; }  // tokens
  const Stretch& operator[](int i) const { return stretches_[static_cast<std::size_t>(i)]; }

 private:
  std::vector<BatchPart> parts_;
  std::vector<Stretch> stretches_;
  int longest_ = 0;
};

}  // namespace kvloom
