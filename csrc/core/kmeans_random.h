// SplitMix64: small, and the same numbers on every machine.
#pragma once

#include <algorithm>
#include <cstdint>

namespace phiquant {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // In [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  // 0 .. n - 1
  int64_t below(int64_t n) { return std::min(static_cast<int64_t>(uniform() * static_cast<double>(n)), n - 1); }

 private:
  uint64_t next() {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  uint64_t state_;
};

}  // namespace phiquant
