#include "weight_memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>

namespace kvloom {

namespace {

constexpr std::size_t kRegionBytes = std::size_t{256} << 20;  // address space; pages are committed when they are written
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kGuard = 64 << 10;  // kernels prefetch past the end of a weight

struct Region {
  char* mapped;
  std::size_t mapped_bytes;
  char* at;
  std::size_t left;

  explicit Region(std::size_t bytes) : mapped_bytes(bytes + kHugePage) {
    void* p = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mapped = static_cast<char*>(p);
    at = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(mapped) + kHugePage - 1) / kHugePage * kHugePage);
    left = bytes;
#if defined(MADV_HUGEPAGE)
    madvise(at, left, MADV_HUGEPAGE);
#endif
  }
  ~Region() { munmap(mapped, mapped_bytes); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
};

}  // namespace

std::shared_ptr<char> allocate_weight(std::size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Region> current;
  bytes = (bytes + 4095) / 4096 * 4096;
  std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Region> region = current.lock();
  if (!region || region->left < bytes) {
    region = std::make_shared<Region>(bytes + kGuard > kRegionBytes ? bytes + kGuard : kRegionBytes);
    current = region;
  }
  char* data = region->at;
  region->at += bytes;
  region->left -= bytes;
  return std::shared_ptr<char>(region, data);
}

}  // namespace kvloom
