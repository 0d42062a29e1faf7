// Memory for long arrays. Touching 100 MB of new memory costs more in page faults of 4 KiB than the kernels' arithmetic
// does; for arrays of several MB the system is asked for pages of 2 MiB instead.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace phiquant {

constexpr size_t kLargePage = size_t{2} << 20;

// Asks for large pages where whole ones fit into `bytes` from p. A hint: it may do nothing.
inline void ask_for_large_pages(void* p, size_t bytes) {
#ifdef __linux__
  const auto begin = reinterpret_cast<uintptr_t>(p);
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (begin + bytes) / kLargePage * kLargePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Gives std::vector large pages, and leaves new numbers without a value: nothing is touched before it is needed.
template <class T>
struct LargePages {
  using value_type = T;
  LargePages() = default;
  template <class U>
  LargePages(const LargePages<U>&) {}

  T* allocate(size_t n) {
    const size_t bytes = (n * sizeof(T) + kLargePage - 1) / kLargePage * kLargePage;
    const bool large = n * sizeof(T) >= 2 * kLargePage;
    void* p = large ? std::aligned_alloc(kLargePage, bytes) : std::malloc(n * sizeof(T));
    if (!p) throw std::bad_alloc();
    if (large) ask_for_large_pages(p, bytes);
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t) { std::free(p); }

  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
  template <class U, class... Args>
  void construct(U* p, Args&&... args) {
    ::new (static_cast<void*>(p)) U(std::forward<Args>(args)...);
  }

  bool operator==(const LargePages&) const { return true; }
};

template <class T>
using LargeVector = std::vector<T, LargePages<T>>;

}  // namespace phiquant
