#include "thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <new>
#include <numeric>

namespace kvloom {

namespace {

constexpr int kPauses = 4000;  // some tens of microseconds: longer than the gap between two steps of a decode loop
constexpr double kWaking = 200e-6;  // on a free core a thread begins sooner; a process that took the core keeps it longer
constexpr int kMostThreads = 0xffff;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

double seconds(clockid_t clock) {
  timespec at;
  clock_gettime(clock, &at);
  return static_cast<double>(at.tv_sec) + 1e-9 * static_cast<double>(at.tv_nsec);
}

double now() { return seconds(CLOCK_MONOTONIC); }

thread_local bool inside = false;
bool forked = false;  // written in the only thread of a child

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

int quota_threads(const std::string& root) {
  long long quota = 0, period = 0;
  std::string text;
  if (std::ifstream limit(root + "/cpu.max"); limit >> text >> period) {
    quota = std::atoll(text.c_str());  // 0 for "max"
  } else {
    std::ifstream(root + "/cpu/cpu.cfs_quota_us") >> quota;  // -1: none
    std::ifstream(root + "/cpu/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? static_cast<int>((quota + period - 1) / period) : 0;
}

int default_num_threads() {
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    int n = std::atoi(text);
    if (n > 0) return n;
  }
  const int quota = quota_threads("/sys/fs/cgroup");
  return quota > 0 ? std::min(quota, usable_cores()) : usable_cores();
}

void release_openmp_threads() {
  using Pause = int (*)(int);
  constexpr int kSoft = 1;  // omp_pause_soft: settings stay
  static std::atomic<Pause> found{nullptr};
  if (forked) return;  // the runtime would wait for ever for the parent's team
  Pause pause = found.load(std::memory_order_relaxed);
  if (!pause) {
    pause = reinterpret_cast<Pause>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
    if (!pause) return;
    found.store(pause, std::memory_order_relaxed);
  }
  pause(kSoft);
}

ThreadPool& ThreadPool::instance() {
  // Never destroyed: at exit the workers sleep, and destroying a pool whose threads a fork did not copy would hang.
  static ThreadPool* pool = [] {
    ThreadPool* made = new ThreadPool;
    pthread_atfork([] { instance().call_.lock(); }, [] { instance().call_.unlock(); }, [] { instance().forget(); });
    return made;
  }();
  return *pool;
}

ThreadPool::ThreadPool() : size_(default_num_threads()), team_size_(size_) {}

template <class Ready> void ThreadPool::wait(Ready ready) {
  for (int i = 0; i < kPauses; ++i) {
    if (ready()) return;
    pause();
  }
  // No yield here: another process would get the core for a whole time slice.
  std::unique_lock<std::mutex> lock(sleep_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, ready);
  sleepers_.fetch_sub(1);
}

void ThreadPool::notify() {
  if (sleepers_.load() == 0) return;
  { std::lock_guard<std::mutex> lock(sleep_); }
  wake_.notify_all();
}

// Start the workers of a team of `team` threads.
void ThreadPool::begin(int team) {
  const std::uint64_t last = round_.load();
  round_.store(round_of((last >> 16) + 1, team));
  notify();
  if (team <= team_of(last)) return;
  { std::lock_guard<std::mutex> lock(sleep_); }
  bench_.notify_all();
}

void ThreadPool::start() {
  quit_ = false;
  arrived_ = 0;
  counter_ = 0;
  buffers_.resize(std::max(buffers_.size(), static_cast<std::size_t>(size_)));
  off_.resize(buffers_.size());
  for (int id = 1; id < size_; ++id) threads_.emplace_back(&ThreadPool::work, this, id, round_.load());
}

void ThreadPool::stop() {
  if (threads_.empty()) return;
  quit_ = true;
  begin(size_);
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

void ThreadPool::forget() {
  forked = true;
  new std::vector<std::thread>(std::move(threads_));
  threads_.clear();
  new (&call_) std::mutex;
  new (&sleep_) std::mutex;
  new (&wake_) std::condition_variable;
  new (&bench_) std::condition_variable;
  sleepers_ = 0;
  running_ = 0;
}

void ThreadPool::resize(int num_threads) {
  std::lock_guard<std::mutex> lock(call_);
  num_threads = std::clamp(num_threads, 1, kMostThreads);
  if (num_threads == size_) return;
  stop();
  size_ = num_threads;
  team_size_ = TeamSize(size_);
}

void ThreadPool::work(int id, std::uint64_t seen) {
  inside = true;
  for (std::uint64_t round;;) {
    wait([&] { return (round = round_.load()) != seen; });
    if (team_of(round) <= id) {
      std::unique_lock<std::mutex> lock(sleep_);
      bench_.wait(lock, [&] { return team_of(round = round_.load()) > id; });
    }
    seen = round;
    if (quit_) return;
    take_part(id, team_of(round), short_call_);
    if (running_.fetch_sub(1) == 1) notify();
  }
}

void ThreadPool::take_part(int id, int size, bool timed) {
  Team team(this, id, size);
  if (size == 1 || !timed) return (*function_)(team);
  double begin = now();
  if (begin - begin_ > kWaking) begin = begin_;
  const double ran = seconds(CLOCK_THREAD_CPUTIME_ID);
  (*function_)(team);
  off_[static_cast<std::size_t>(id)] = now() - begin - (seconds(CLOCK_THREAD_CPUTIME_ID) - ran);
}

void ThreadPool::run(const std::function<void(Team&)>& function, const std::function<void(int)>& before,
                     bool short_call) {
  if (inside) std::abort();  // a kernel must not start another parallel call: our own bug
  std::lock_guard<std::mutex> lock(call_);
  if (threads_.empty()) start();
  const int team = short_call ? team_size_.next(now()) : size_.load();
  short_call_ = short_call;
  if (before) before(team);
  function_ = &function;
  counter_ = 0;
  running_ = team - 1;
  begin_ = now();
  begin(team);
  inside = true;
  take_part(0, team, short_call);
  inside = false;
  if (team == 1) return;
  wait([&] { return running_.load() == 0; });
  if (short_call) team_size_.record(begin_, now(), std::accumulate(off_.begin(), off_.begin() + team, 0.0));
}

void Team::barrier() {
  if (size_ == 1) {
    pool_->counter_.store(0, std::memory_order_relaxed);
    return;
  }
  unsigned phase = pool_->phase_.load();
  if (pool_->arrived_.fetch_add(1) == size_ - 1) {
    pool_->arrived_.store(0);
    pool_->counter_.store(0);
    pool_->phase_.fetch_add(1);
    pool_->notify();
    return;
  }
  pool_->wait([&] { return pool_->phase_.load() != phase; });
}

int Team::next() { return pool_->counter_.fetch_add(1, std::memory_order_relaxed); }

char* Team::scratch(std::size_t bytes) {
  auto& buffer = pool_->buffers_[static_cast<std::size_t>(id_)];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = static_cast<char*>(std::aligned_alloc(4096, rounded));
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace kvloom
