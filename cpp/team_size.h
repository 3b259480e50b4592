// The number of threads of a call while other processes use the cores.
#pragma once

namespace kvloom {

// At a barrier threads wait for one that is not running. So beside a busy process a team of as many threads as cores is
// slower than one with a thread fewer. After each call the time is recorded in which its threads were not running. If they
// use hardly more cores than one thread fewer would, the team drops a thread. It tries the larger team again after a pause,
// which doubles after each failure. Times are seconds of one clock.
class TeamSize {
 public:
  explicit TeamSize(int most) : most_(most), size_(most) {}
  // Threads of the call that starts at `now`.
  int next(double now);
  // A call of `next` threads took from `begin` to `now`; `off` is the time in which its threads were in the call without
  // running, asleep or kept from the cores, summed over them.
  void record(double begin, double now, double off);

 private:
  int most_, size_;
  double debt_ = 0;      // time off beyond the cost of a smaller team
  double proving_ = 0;   // remaining time of calls after which an enlarged team counts as successful
  double pause_ = 0;     // from the last reduction to the next try
  double next_try_ = 0;
};

}  // namespace kvloom
