#include "step_stretches.h"

#include <algorithm>

namespace kvloom {

void BatchPart::add(const Batch& whole, int b, int begin, int end) {
  cu_seqlens.push_back(cu_seqlens.back() + end - begin);
  seq_rows.push_back(whole.seq_rows[b]);
  later.push_back((whole.later ? whole.later[b] : 0) + whole.cu_seqlens[b + 1] - end);
  in_step.push_back(whole.step_count(b));
}

Batch BatchPart::batch() const {
  Batch batch;
  batch.num_tokens = cu_seqlens.back();
  batch.num_seqs = static_cast<int>(seq_rows.size());
  batch.cu_seqlens = cu_seqlens.data();
  batch.seq_rows = seq_rows.data();
  batch.later = later.data();
  batch.in_step = in_step.data();
  return batch;
}

Stretches::Stretches(const Batch& batch, int block) {
  const int total = batch.num_tokens;
  if (total <= kUncut) {
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
  parts_.resize(cuts.size() - 1);
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    for (int b = 0; b < batch.num_seqs; ++b) {
      const int begin = std::max(cuts[i], batch.cu_seqlens[b]), end = std::min(cuts[i + 1], batch.cu_seqlens[b + 1]);
      if (begin < end) parts_[i].add(batch, b, begin, end);
    }
    stretches_.push_back({cuts[i], parts_[i].batch()});
    longest_ = std::max(longest_, stretches_.back().batch.num_tokens);
  }
}

}  // namespace kvloom
