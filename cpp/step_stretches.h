// A long step, cut into stretches of tokens that every layer processes one after another. So intermediate results stay in
// the caches, and their memory does not grow with the step.
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

// The arrays of a batch that is a part of a step.
struct BatchPart {
  std::vector<int32_t> cu_seqlens = {0}, seq_rows, later, in_step;

  // Add sequence `b` of `whole` with its tokens [begin, end) only, which are indices in `whole`.
  void add(const Batch& whole, int b, int begin, int end);
  Batch batch() const;  // valid until the next `add`
};

struct Stretch {
  int first;  // token of the step
  Batch batch;
};

class Stretches {
 public:
  static constexpr int kTokens = 512;                    // about so many tokens a stretch
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
