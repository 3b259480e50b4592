#include "wanted_rows.h"

namespace kvloom {

WantedRows::WantedRows(const StepCall& call, const Stretches& stretches) {
  const bool all = call.hidden || call.lse;  // of every token
  if (all || call.num_logits >= call.batch.num_tokens) return;
  std::vector<char> wanted(static_cast<std::size_t>(call.batch.num_tokens), 0);
  for (int r = 0; r < call.num_logits; ++r) wanted[static_cast<std::size_t>(call.logit_rows[r])] = 1;
  moved_.assign(wanted.size(), -1);
  pieces_.resize(static_cast<std::size_t>(stretches.size()));
  for (int i = 0; i < stretches.size(); ++i) {
    const Stretch& stretch = stretches[i];
    const Batch& batch = stretch.batch;
    Piece& piece = pieces_[static_cast<std::size_t>(i)];
    piece.cu_seqlens.push_back(0);
    for (int b = 0; b < batch.num_seqs; ++b) {
      int begin = batch.cu_seqlens[b], end = batch.cu_seqlens[b + 1];
      const auto is_wanted = [&](int t) { return wanted[static_cast<std::size_t>(stretch.first + t)] != 0; };
      while (begin < end && !is_wanted(begin)) ++begin;
      while (begin < end && !is_wanted(end - 1)) --end;
      if (begin == end) continue;
      for (int t = begin; t < end; ++t) {
        moved_[static_cast<std::size_t>(stretch.first + t)] = stretch.first + static_cast<int>(piece.source.size());
        piece.source.push_back(t);
      }
      piece.cu_seqlens.push_back(static_cast<int32_t>(piece.source.size()));
      piece.seq_rows.push_back(batch.seq_rows[b]);
      piece.later.push_back((batch.later ? batch.later[b] : 0) + batch.cu_seqlens[b + 1] - end);
      piece.in_step.push_back(batch.step_count(b));
    }
    Batch own;
    own.num_tokens = static_cast<int>(piece.source.size());
    own.num_seqs = static_cast<int>(piece.seq_rows.size());
    own.cu_seqlens = piece.cu_seqlens.data();
    own.seq_rows = piece.seq_rows.data();
    own.later = piece.later.data();
    own.in_step = piece.in_step.data();
    kept_.push_back({stretch.first, own});
  }
}

}  // namespace kvloom
