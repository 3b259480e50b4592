// Threads that live as long as the process and run one function together.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "team_size.h"

namespace kvloom {

class ThreadPool;

// The team of threads, as passed to a function that runs on all of them.
class Team {
 public:
  int id() const { return id_; }
  int size() const { return size_; }
  // Wait until every thread has arrived. The work counter is zero afterwards.
  void barrier();
  // Claim the next number of the current phase, from 0; each number is given once.
  int next();
  // This thread's scratch memory, 64-byte aligned, at least `bytes`; it keeps its content only within a call.
  char* scratch(std::size_t bytes);
  // This thread's share of `n` items in one contiguous range.
  void share(int n, int* begin, int* end) const {
    *begin = static_cast<int>(static_cast<long long>(n) * id_ / size_);
    *end = static_cast<int>(static_cast<long long>(n) * (id_ + 1) / size_);
  }

 private:
  friend class ThreadPool;
  Team(ThreadPool* pool, int id, int size) : pool_(pool), id_(id), size_(size) {}
  ThreadPool* pool_;
  int id_, size_;
};

// Persistent workers. A waiting thread spins for some microseconds, then sleeps in the kernel, so an idle pool uses no
// core. Beside a busy process the team of a short call is smaller than the pool, and the other workers sleep. Calls from
// several threads run one after another. A fork waits until the call in progress is done; the child starts its own workers
// on the first call.
class ThreadPool {
 public:
  static ThreadPool& instance();
  int size() const { return size_; }
  void resize(int num_threads);  // takes effect at the next run; at least 1
  // `before` gets the number of threads that will run, and runs alone; it allocates memory that depends on the team.
  // A `short_call` may get a smaller team beside a busy process. It should have many barriers and take milliseconds: in a
  // longer one the other process may end long before the call.
  void run(const std::function<void(Team&)>& function, const std::function<void(int)>& before = nullptr,
           bool short_call = false);

 private:
  friend class Team;
  struct Buffer {
    char* data = nullptr;
    std::size_t bytes = 0;
  };
  // Calls so far, and the team of the last one.
  static std::uint64_t round_of(std::uint64_t calls, int team) { return calls << 16 | static_cast<std::uint64_t>(team); }
  static int team_of(std::uint64_t round) { return static_cast<int>(round & 0xffff); }
  ThreadPool();
  void work(int id, std::uint64_t seen);
  void take_part(int id, int team, bool timed);
  void start();
  void stop();
  void forget();  // in the child of a fork: the workers exist in the parent only

  std::atomic<int> size_{1};
  std::mutex call_;  // one run at a time
  std::vector<std::thread> threads_;
  std::vector<Buffer> buffers_;
  const std::function<void(Team&)>* function_ = nullptr;
  bool quit_ = false, short_call_ = false;
  TeamSize team_size_;
  double begin_ = 0;         // when the call began
  std::vector<double> off_;  // of each thread of the team: seconds of the call without running

  alignas(64) std::atomic<std::uint64_t> round_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
  alignas(64) std::atomic<int> counter_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex sleep_;
  std::condition_variable wake_;   // of the team
  std::condition_variable bench_;  // of the others

  template <class Ready> void wait(Ready ready);
  void notify();
  void begin(int team);
};

// `OMP_NUM_THREADS`, or as many as the process may use: cores it may run on, and the quota of its control group.
int default_num_threads();

// Cores that a control group mounted at `root` (/sys/fs/cgroup) grants, rounded up; 0 without a quota.
int quota_threads(const std::string& root);

// OpenMP threads of other libraries spin for milliseconds after each parallel region and occupy the cores. Make their
// runtime, where one is loaded, release the calling thread's team; its next region creates a new one.
void release_openmp_threads();

}  // namespace kvloom
