#include "wanted_rows.h"

namespace kvloom {

WantedRows::WantedRows(const StepCall& call, const Stretches& stretches) {
  const bool all = call.hidden || call.lse;  // of every token
  if (all || call.num_logits >= call.batch.num_tokens) return;
  std::vector<char> wanted(static_cast<std::size_t>(call.batch.num_tokens), 0);
  for (int r = 0; r < call.num_logits; ++r) wanted[static_cast<std::size_t>(call.logit_rows[r])] = 1;
  moved_.assign(wanted.size(), -1);
  parts_.resize(static_cast<std::size_t>(stretches.size()));
  sources_.resize(parts_.size());
  for (int i = 0; i < stretches.size(); ++i) {
    const Stretch& stretch = stretches[i];
    const Batch& batch = stretch.batch;
    BatchPart& part = parts_[static_cast<std::size_t>(i)];
    std::vector<int>& source = sources_[static_cast<std::size_t>(i)];
    for (int b = 0; b < batch.num_seqs; ++b) {
      int begin = batch.cu_seqlens[b], end = batch.cu_seqlens[b + 1];
      const auto is_wanted = [&](int t) { return wanted[static_cast<std::size_t>(stretch.first + t)] != 0; };
      while (begin < end && !is_wanted(begin)) ++begin;
      while (begin < end && !is_wanted(end - 1)) --end;
      if (begin == end) continue;
      for (int t = begin; t < end; ++t) {
        moved_[static_cast<std::size_t>(stretch.first + t)] = stretch.first + static_cast<int>(source.size());
        source.push_back(t);
      }
      part.add(batch, b, begin, end);
    }
    kept_.push_back({stretch.first, part.batch()});
  }
}

}  // namespace kvloom
