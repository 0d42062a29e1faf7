// What the kernel tests share: a guard that forces a CPU level, and inputs with every awkward value.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/cpu.h"
#include "core/half.h"
#include "core/types.h"

namespace phiquant {

// Runs the enclosing scope at `level`.
class LevelGuard {
 public:
  explicit LevelGuard(Level level) : before_(cpu_level()) { set_cpu_level(level); }
  ~LevelGuard() { set_cpu_level(before_); }
  LevelGuard(const LevelGuard&) = delete;
  LevelGuard& operator=(const LevelGuard&) = delete;

 private:
  Level before_;
};

inline std::vector<float> gaussian(int64_t n, uint32_t seed, float sigma = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = normal(engine);
  return values;
}

// Gaussian values with ties, zeros, NaN, infinities, huge and tiny ones strewn in.
inline std::vector<float> awkward(int64_t n, uint32_t seed) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> special = {0.0f, -0.0f, 0.5f,   -0.5f, 1.5f,   2.5f,    -2.5f,    std::nanf(""), inf,
                                      -inf, 1e30f, -1e30f, 3e38f, 1e-40f, -1e-40f, 65504.0f, 65520.0f,      6e-8f};
  std::vector<float> values = gaussian(n, seed);
  std::mt19937 engine(seed + 1);
  for (float& v : values) {
    if (engine() % 5 == 0) v = special[engine() % special.size()];
  }
  return values;
}

// The values stored as `dtype`, as raw bytes that a kernel reads.
inline std::vector<char> store_as(Dtype dtype, const std::vector<float>& values) {
  const size_t size = dtype == Dtype::f32 ? 4 : 2;
  std::vector<char> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == Dtype::f32) std::memcpy(&bytes[i * 4], &values[i], 4);
    if (dtype == Dtype::bf16) {
      const bf16 h = from_float<bf16>(values[i]);
      std::memcpy(&bytes[i * 2], &h, 2);
    }
    if (dtype == Dtype::f16) {
      const f16 h = from_float<f16>(values[i]);
      std::memcpy(&bytes[i * 2], &h, 2);
    }
  }
  return bytes;
}

}  // namespace phiquant
