// What the fuzz targets share. A target is fed bytes that libFuzzer mutates towards code not yet reached; the
// sanitizers watch every read and write, and the target itself aborts where a promise is broken.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

// Ends the run, and libFuzzer keeps the input, unless `ok`.
#define EXPECT(ok)                                                          \
  do {                                                                      \
    if (!(ok)) {                                                            \
      std::fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #ok); \
      std::abort();                                                         \
    }                                                                       \
  } while (false)

// A copy on the heap, of exactly its size: one byte further and AddressSanitizer sees it.
template <class T>
std::unique_ptr<T[]> exact(const T* data, size_t size) {
  std::unique_ptr<T[]> copy(new T[size]);
  std::copy(data, data + size, copy.get());
  return copy;
}
