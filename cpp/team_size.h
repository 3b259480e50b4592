// How many threads a call gets beside others that want the cores.
#pragma once

namespace kvloom {

// Threads that work in step wait for the one that is not running, so a team as large as the machine is slower beside a
// busy process than one that leaves it a core. After each call the team hears how long its threads were not running,
// and gives up its last place if they fill hardly more cores than one thread fewer would. A while later it tries again,
// and each time in vain it waits twice as long until the next. Times are seconds of one clock.
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
  double debt_ = 0;      // time off beyond what a smaller team would cost
  double proving_ = 0;   // time of calls that a team just enlarged has to go on without shrinking
  double pause_ = 0;     // from the last reduction to the next try
  double next_try_ = 0;
};

}  // namespace kvloom
