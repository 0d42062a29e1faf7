// The rotation at every CPU level against the matrix it stands for, and against the reference bit for bit.
#include "core/hadamard.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "support.h"

namespace phiquant {
namespace {

// A matrix of signs; the kernel does not ask whether its rows are orthogonal.
std::vector<float> signs(int64_t n, uint32_t seed) {
  std::vector<float> values = gaussian(n, seed);
  for (float& v : values) v = v < 0.0f ? -1.0f : 1.0f;
  return values;
}

using Sizes = std::pair<int64_t, int64_t>;  // of B and of S

class HadamardLevels : public ::testing::TestWithParam<std::tuple<Level, Sizes>> {};

TEST_P(HadamardLevels, EqualsTheProductWithTheMatrix) {
  const auto& [level, sizes] = GetParam();
  const auto [base, power] = sizes;
  const int64_t n = base * power;
  const int64_t rows = 3;
  const std::vector<float> matrix = signs(base * base, 1);
  const std::vector<float> flips = signs(n, 2);
  const std::vector<float> x = gaussian(rows * n, 3);
  const float scale = 1.0f / std::sqrt(static_cast<float>(n));
  const Hadamard h = {base, power, matrix.data(), flips.data(), scale};
  std::vector<float> found = x;
  std::vector<float> reference = x;
  const LevelGuard guard(level);
  hadamard_kernels().rotate(found.data(), 1, h);  // two parts, as two threads take them
  hadamard_kernels().rotate(found.data() + n, rows - 1, h);
  hadamard_ref.rotate(reference.data(), rows, h);
  EXPECT_EQ(std::memcmp(found.data(), reference.data(), found.size() * sizeof(float)), 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0.0;
      for (int64_t i = 0; i < n; ++i) {
        const bool odd = std::popcount(static_cast<uint64_t>((i % power) & (j % power))) % 2;
        const double b = base > 1 ? matrix[static_cast<size_t>(i / power * base + j / power)] : 1.0;
        sum += x[static_cast<size_t>(r * n + i)] * flips[static_cast<size_t>(i)] * b * (odd ? -1.0 : 1.0);
      }
      ASSERT_NEAR(found[static_cast<size_t>(r * n + j)], sum * scale, 2e-6 * static_cast<double>(base));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, HadamardLevels,
                         ::testing::Combine(::testing::ValuesIn(available_levels()),
                                            ::testing::Values(Sizes{1, 1}, Sizes{1, 2}, Sizes{1, 64}, Sizes{1, 512},
                                                              Sizes{12, 8}, Sizes{12, 64}, Sizes{20, 16},
                                                              Sizes{4, 256})));

}  // namespace
}  // namespace phiquant
