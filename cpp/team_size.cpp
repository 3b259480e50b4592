#include "team_size.h"

#include <algorithm>

namespace kvloom {

namespace {

// A thread without a core loses its whole time (share 1). Spinning before a sleep hides some of it, so the limit is lower.
constexpr double kShare = 0.75;
constexpr double kMostDebt = 0.05;       // seconds; a host may preempt a core for some milliseconds at times
constexpr double kMostOnTrial = 0.005;   // about a time slice
constexpr double kProof = 0.1;
constexpr double kFirstPause = 0.1, kLongestPause = 2;

}  // namespace

int TeamSize::next(double now) {
  if (size_ < most_ && proving_ <= 0 && now >= next_try_) {
    ++size_;
    debt_ = 0;
    proving_ = kProof;
  }
  return size_;
}

void TeamSize::record(double begin, double now, double off) {
  if (size_ == 1) return;
  const double took = now - begin;
  debt_ = std::max(0.0, debt_ + off - kShare * took);
  if (debt_ > (proving_ > 0 ? kMostOnTrial : kMostDebt)) {
    pause_ = proving_ > 0 && pause_ > 0 ? std::min(2 * pause_, kLongestPause) : kFirstPause;
    --size_;
    debt_ = 0;
    proving_ = 0;
    next_try_ = now + pause_;
  } else if (proving_ > 0 && (proving_ -= took) <= 0) {
    pause_ = 0;
    next_try_ = now;
  }
}

}  // namespace kvloom
