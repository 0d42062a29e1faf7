// GPTQ's step at every CPU level against its formula, written with the encode and decode of affine.h.
#include "core/gptq.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "core/affine.h"
#include "support.h"

namespace phiquant {
namespace {

struct Case {
  int64_t columns;
  int64_t rows;
  int64_t groups;
  Grid grid;
  std::vector<float> target, weight, feedback, scale, offset, levels;
  std::vector<int64_t> column;
  std::vector<int8_t> codes;

  Case(int64_t c, int64_t n, int64_t g, Grid grid, uint32_t seed)
      : columns(c), rows(n), groups(g), grid(grid), codes(static_cast<size_t>(c * n), 99) {
    target = gaussian(c * n, seed);
    weight = gaussian(c * n, seed + 1);
    feedback = gaussian(c * c, seed + 2, 0.3f);
    scale = gaussian(g * n, seed + 3, 0.2f);
    scale[0] = 0.0f;
    offset = gaussian(g * n, seed + 4);
    if (grid.offset == Offset::zero_point) {
      for (float& z : offset) z = std::nearbyint(3.0f * z);
    }
    if (grid.format != Format::integer) std::fill(offset.begin(), offset.end(), 0.0f);
    target[static_cast<size_t>(n / 2)] = std::nanf("");
    if (grid.per_block) {  // tables of their own for each scale, some levels the same
      levels = gaussian(g * n * grid.size, seed + 5);
      for (size_t at = 0; at < levels.size(); at += static_cast<size_t>(grid.size)) {
        std::sort(&levels[at], &levels[at] + grid.size);
        levels[at + 1] = levels[at];
      }
    }
    column.resize(static_cast<size_t>(c));
    std::iota(column.rbegin(), column.rend(), 0);  // reversed, and the first two exchanged
    if (c > 1) std::swap(column[0], column[1]);
  }

  GptqRun run() {
    return {columns,         rows,          columns / groups, target.data(), weight.data(),
            feedback.data(), column.data(), scale.data(),     offset.data(), codes.data()};
  }

  Grid tables() const {
    Grid own = grid;
    if (grid.per_block) own.levels = levels.data();
    return own;
  }

  // The formula, a row at a time.
  void expect() {
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t k = columns - 1; k >= 0; --k) {
        float t = target[static_cast<size_t>(k * rows + n)];
        for (int64_t j = columns - 1; j > k; --j) {
          t += feedback[static_cast<size_t>(k * columns + j)] * weight[static_cast<size_t>(j * rows + n)];
        }
        const int64_t place = column[static_cast<size_t>(k)];
        const size_t parameters = static_cast<size_t>(place / (columns / groups) * rows + n);
        const BlockParams params = {&scale[parameters], &offset[parameters]};
        const Layout one = {Dtype::f32, 1, 1};
        int8_t& code = codes[static_cast<size_t>(place * rows + n)];
        float value;
        Grid own = grid;
        if (grid.per_block) own.levels = &levels[parameters * static_cast<size_t>(grid.size)];
        affine_ref.quantize(&t, one, params, own, &code);
        affine_ref.dequantize(&code, one, params, own, &value);
        weight[static_cast<size_t>(k * rows + n)] -= value;
      }
    }
  }
};

constexpr float kLevels[] = {-1.5f, -0.25f, 0.0f, 0.5f, 2.0f};

std::vector<Grid> grids() {
  const Grid table = {-1.5f, 2.0f, Offset::zero_point, Format::table, kLevels, 5};
  return {{-8.0f, 7.0f, Offset::zero_point},
          {0.0f, 15.0f, Offset::zero_point},
          {0.0f, 15.0f, Offset::minimum},
          {-6.0f, 6.0f, Offset::zero_point, Format::e2m1},
          table,
          {0.0f, 15.0f, Offset::zero_point, Format::table, kLevels, 16, true},
          {0.0f, 199.0f, Offset::zero_point, Format::table, kLevels, 200, true}};
}

class GptqLevels : public ::testing::TestWithParam<std::tuple<Level, int64_t, int64_t, Grid>> {};

TEST_P(GptqLevels, EqualsTheFormula) {
  const auto& [level, columns, rows, grid] = GetParam();
  const int64_t groups = columns % 32 == 0 ? columns / 32 : 1;
  Case found(columns, rows, groups, grid, static_cast<uint32_t>(columns + rows));
  Case expected = found;
  expected.expect();
  const LevelGuard guard(level);
  const int64_t middle = rows / 3;  // two parts, as two threads take them
  gptq_kernels().run(found.run(), found.tables(), 0, middle);
  gptq_kernels().run(found.run(), found.tables(), middle, rows);
  EXPECT_EQ(found.codes, expected.codes);
  EXPECT_EQ(std::memcmp(found.weight.data(), expected.weight.data(), found.weight.size() * sizeof(float)), 0);
}

INSTANTIATE_TEST_SUITE_P(All, GptqLevels,
                         ::testing::Combine(::testing::ValuesIn(available_levels()),
                                            ::testing::Values<int64_t>(1, 3, 64, 128),
                                            ::testing::Values<int64_t>(1, 16, 37, 64, 131),
                                            ::testing::ValuesIn(grids())));

TEST(Gptq, WithoutOffsetsTheZeroPointIsZero) {
  Case with(8, 20, 1, {-8.0f, 7.0f, Offset::zero_point}, 5);
  std::fill(with.offset.begin(), with.offset.end(), 0.0f);
  Case without = with;
  GptqRun run = without.run();
  run.offset = nullptr;
  gptq_kernels().run(with.run(), with.grid, 0, 20);
  gptq_kernels().run(run, without.grid, 0, 20);
  EXPECT_EQ(with.codes, without.codes);
}

}  // namespace
}  // namespace phiquant
