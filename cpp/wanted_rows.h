// The tokens of a step whose outputs are wanted. For all others the last layer computes keys and values only: in a
// prompt's last layer, queries, attention and MLP have one row.
//
//   tokens          | prompt ............................ x | prompt, first chunk ... | d | d |
//   behind the keys                                       x                             d   d
//
// They are taken from the first to the last wanted token of each sequence, so that a sequence stays one run of rows.
#pragma once

#include <vector>

#include "decoder.h"
#include "step_stretches.h"

namespace kvloom {

class WantedRows {
 public:
  WantedRows(const StepCall& call, const Stretches& stretches);
  // Whether any row is left out.
  bool fewer() const { return !kept_.empty(); }
  // The kept rows of stretch `i`, moved to the front of the stretch.
  const Stretch& operator[](int i) const { return kept_[static_cast<std::size_t>(i)]; }
  // Former indices of its rows within the stretch; ascending.
  const std::vector<int>& sources(int i) const { return sources_[static_cast<std::size_t>(i)]; }
  // Row of token `t` of the step after all stretches.
  int row_of(int t) const { return fewer() ? moved_[static_cast<std::size_t>(t)] : t; }

 private:
  std::vector<BatchPart> parts_;
  std::vector<std::vector<int>> sources_;
  std::vector<Stretch> kept_;
  std::vector<int> moved_;
};

}  // namespace kvloom
