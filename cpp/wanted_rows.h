// The tokens of a step whose outputs somebody waits for. Of all others the last layer has to make keys and values only:
// a prompt's step ends with one row of queries, attention and MLP there.
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
  // Whether there is anything to leave out.
  bool fewer() const { return !kept_.empty(); }
  // What is left of stretch `i`: its rows, moved to the front of the stretch.
  const Stretch& operator[](int i) const { return kept_[static_cast<std::size_t>(i)]; }
  // Where its rows were, counted from the first of the stretch; ascending.
  const std::vector<int>& sources(int i) const { return sources_[static_cast<std::size_t>(i)]; }
  // Where token `t` of the step lies once all stretches are through.
  int row_of(int t) const { return fewer() ? moved_[static_cast<std::size_t>(t)] : t; }

 private:
  std::vector<BatchPart> parts_;
  std::vector<std::vector<int>> sources_;
  std::vector<Stretch> kept_;
  std::vector<int> moved_;
};

}  // namespace kvloom
