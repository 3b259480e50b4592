#include "thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <new>

namespace kvloom {

namespace {

constexpr int kPauses = 4000;  // some tens of microseconds: longer than the gap between two steps of a decode loop
constexpr int kYields = 64;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

thread_local bool inside = false;

}  // namespace

int default_num_threads() {
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    int n = std::atoi(text);
    if (n > 0) return n;
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    int n = CPU_COUNT(&set);
    if (n > 0) return n;
  }
#endif
  int n = static_cast<int>(std::thread::hardware_concurrency());
  return n > 0 ? n : 1;
}

ThreadPool& ThreadPool::instance() {
  // Never destroyed: at exit the workers sleep, and destroying a pool whose threads a fork did not copy would hang.
  static ThreadPool* pool = new ThreadPool;
  return *pool;
}

ThreadPool::ThreadPool() : size_(default_num_threads()) {}

ThreadPool::~ThreadPool() { stop(); }

template <class Ready> void ThreadPool::wait(Ready ready) {
  for (int i = 0; i < kPauses; ++i) {
    if (ready()) return;
    pause();
  }
  for (int i = 0; i < kYields; ++i) {  // the thread waited for may want this core
    if (ready()) return;
    sched_yield();
  }
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

void ThreadPool::start() {
  process_ = static_cast<int>(getpid());
  quit_ = false;
  arrived_ = 0;
  counter_ = 0;
  buffers_.resize(static_cast<std::size_t>(size_));
  for (int id = 1; id < size_; ++id) threads_.emplace_back(&ThreadPool::work, this, id, generation_.load());
}

void ThreadPool::stop() {
  if (threads_.empty()) return;
  if (process_ == static_cast<int>(getpid())) {
    quit_ = true;
    generation_.fetch_add(1);
    notify();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  } else {  // the child of a fork: these threads exist in the parent only
    new std::vector<std::thread>(std::move(threads_));
    threads_.clear();
    new (&sleep_) std::mutex;
    new (&wake_) std::condition_variable;
    sleepers_ = 0;
    running_ = 0;
  }
}

void ThreadPool::resize(int num_threads) {
  std::lock_guard<std::mutex> lock(call_);
  num_threads = num_threads < 1 ? 1 : num_threads;
  if (num_threads == size_) return;
  stop();
  size_ = num_threads;
}

void ThreadPool::work(int id, unsigned seen) {
  inside = true;
  for (;;) {
    wait([&] { return generation_.load() != seen; });
    seen = generation_.load();
    if (quit_) return;
    Team team(this, id, size_);
    (*function_)(team);
    if (running_.fetch_sub(1) == 1) notify();
  }
}

void ThreadPool::run(const std::function<void(Team&)>& function) {
  if (inside) std::abort();  // a kernel must not start another parallel call: our own bug
  std::lock_guard<std::mutex> lock(call_);
  if (!threads_.empty() && process_ != static_cast<int>(getpid())) stop();
  if (threads_.empty() || buffers_.empty()) start();
  function_ = &function;
  counter_ = 0;
  running_ = size_ - 1;
  if (size_ > 1) {
    generation_.fetch_add(1);
    notify();
  }
  inside = true;
  Team team(this, 0, size_);
  function(team);
  inside = false;
  if (size_ > 1) wait([&] { return running_.load() == 0; });
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
