#include "step_stretches.h"

#include <algorithm>

namespace kvloom {

Stretches::Stretches(const Batch& batch, int block) {
  const int total = batch.num_tokens;
  if (total <= kTokens + kTokens / 2) {
    stretches_.push_back({0, batch});
    longest_ = total;
    return;
  }
  const int count = (total + kTokens - 1) / kTokens, wanted = (total + count - 1) / count;
  std::vector<int> cuts = {0};
  for (int seq = 0; cuts.back() < total;) {
    int cut = std::min(total, cuts.back() + wanted + block);  // rounded down, still about `wanted`
    while (batch.cu_seqlens[seq + 1] < cut) ++seq;
    if (cut < total) cut = batch.cu_seqlens[seq] + (cut - batch.cu_seqlens[seq]) / block * block;
    cuts.push_back(cut);
  }
  pieces_.resize(cuts.size() - 1);
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    Piece& piece = pieces_[i];
    piece.cu_seqlens.push_back(0);
    for (int b = 0; b < batch.num_seqs; ++b) {
      const int begin = std::max(cuts[i], batch.cu_seqlens[b]), end = std::min(cuts[i + 1], batch.cu_seqlens[b + 1]);
      if (begin >= end) continue;
      piece.cu_seqlens.push_back(end - cuts[i]);
      piece.seq_rows.push_back(batch.seq_rows[b]);
      piece.later.push_back(batch.cu_seqlens[b + 1] - end);
      piece.in_step.push_back(batch.count(b));
    }
    Batch own;
    own.num_tokens = cuts[i + 1] - cuts[i];
    own.num_seqs = static_cast<int>(piece.seq_rows.size());
    own.cu_seqlens = piece.cu_seqlens.data();
    own.seq_rows = piece.seq_rows.data();
    own.later = piece.later.data();
    own.in_step = piece.in_step.data();
    stretches_.push_back({cuts[i], own});
    longest_ = std::max(longest_, own.num_tokens);
  }
}

}  // namespace kvloom
