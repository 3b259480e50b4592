// An allocator of standard containers that puts large blocks on huge pages where the system has them. So a buffer that
// grows to megabytes in the first long prompt costs a few page faults instead of thousands. Elements that `resize` adds
// are not initialised.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kvloom {

template <class T> struct HugeAllocator {
  using value_type = T;
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;

  HugeAllocator() = default;
  template <class U> HugeAllocator(const HugeAllocator<U>&) {}

  T* allocate(std::size_t n) {
    const std::size_t bytes = n * sizeof(T), unit = bytes < kHugePage / 2 ? 64 : kHugePage;
    const std::size_t rounded = (bytes + unit - 1) / unit * unit;
    void* p = std::aligned_alloc(unit, rounded);
    if (!p) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (unit == kHugePage) madvise(p, rounded, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(p);
  }
  void deallocate(T* p, std::size_t) { std::free(p); }
  // Elements are not written here, so that each page is first touched by the thread that uses it.
  template <class U> void construct(U* p) { ::new (static_cast<void*>(p)) U; }

  friend bool operator==(const HugeAllocator&, const HugeAllocator&) { return true; }
  friend bool operator!=(const HugeAllocator&, const HugeAllocator&) { return false; }
};

// Make the system commit the pages of `buffer` now, as a first write would; their content stays. Where the system cannot,
// pages are committed when they are written.
template <class Buffer> void make_pages(Buffer& buffer) {
#if defined(__linux__)
  constexpr std::size_t kPage = 4096;
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14
  const std::size_t begin = (reinterpret_cast<std::size_t>(buffer.data()) + kPage - 1) / kPage * kPage;
  const std::size_t end = reinterpret_cast<std::size_t>(buffer.data() + buffer.size()) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, kPopulateWrite);
#else
  (void)buffer;
#endif
}

}  // namespace kvloom
