// Gradients of learned scales: levels equal, and the formula value by value in fp64.
#include "core/learned.h"

#include <gtest/gtest.h>

#include <cmath>

#include "support.h"

namespace phiquant {
namespace {

struct Result {
  std::vector<char> dx;
  std::vector<double> dscale, clipped;
};

Result run(const LearnedKernels& kernels, const std::vector<char>& grad, const std::vector<char>& x, Layout l,
           const std::vector<float>& scale, const std::vector<float>& offset, Grid grid) {
  Result r{std::vector<char>(x.size()), std::vector<double>(scale.size()), std::vector<double>(scale.size())};
  kernels.backward(grad.data(), x.data(), l, {scale.data(), offset.empty() ? nullptr : offset.data()}, grid,
                   r.dx.data(), r.dscale.data(), r.clipped.data());
  return r;
}

TEST(Learned, EveryLevelGivesTheSameBits) {
  for (const int64_t block : {1, 7, 8, 15, 16, 17, 31, 32, 33, 100, 4095, 4096, 4097, 9001}) {
    const int64_t blocks = 5;
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      const auto x = store_as(dtype, awkward(blocks * block, 3));
      const auto grad = store_as(dtype, gaussian(blocks * block, 4));
      const std::vector<float> scale = {0.3f, -0.2f, 0.0f, 1e-40f, 2.0f};
      for (const Offset offset : {Offset::zero_point, Offset::minimum}) {
        const Grid grid{-8, 7, offset};
        const std::vector<float> offsets = {0.0f, -3.0f, 5.0f, 1.0f, -8.0f};
        const Layout layout{dtype, blocks, block};
        const Result expected = run(learned_ref, grad, x, layout, scale, offsets, grid);
        for (const Level level : available_levels()) {
          const LevelGuard guard(level);
          const Result found = run(learned_kernels(), grad, x, layout, scale, offsets, grid);
          EXPECT_EQ(found.dx, expected.dx) << level_name(level) << " " << block;
          for (size_t b = 0; b < scale.size(); ++b) {
            // a sum may be NaN (an infinite value inside a block of scale 0); else the bits are equal
            EXPECT_EQ(std::isnan(found.dscale[b]), std::isnan(expected.dscale[b]));
            EXPECT_TRUE(found.dscale[b] == expected.dscale[b] || std::isnan(found.dscale[b])) << level_name(level);
            EXPECT_EQ(found.clipped[b], expected.clipped[b]) << level_name(level);
          }
        }
      }
    }
  }
}

TEST(Learned, TheFormulaValueByValue) {
  const Grid int4{-8, 7, Offset::zero_point};
  // inside, on a tie, below, above, NaN, infinite, inside
  const std::vector<float> x = {0.6f, 1.25f, -5.0f, 4.0f, std::nanf(""), INFINITY, -1.0f};
  const std::vector<float> g = {1.0f, 2.0f, 3.0f, 5.0f, 7.0f, 11.0f, 13.0f};
  const auto bytes = [](const std::vector<float>& v) { return store_as(Dtype::f32, v); };
  const Result r = run(learned_ref, bytes(g), bytes(x), {Dtype::f32, 1, 7}, {0.5f}, {}, int4);
  EXPECT_EQ(r.dx, bytes({1.0f, 2.0f, 0.0f, 0.0f, 0.0f, 0.0f, 13.0f}));
  // v = 1.2, 2.5, -10, 8, NaN, inf, -2: c - v = -0.2, -0.5; -8; 7; -8 (a NaN has the code qmin); 7; 0
  EXPECT_NEAR(r.dscale[0], 1 * -0.2 + 2 * -0.5 + 3 * -8 + 5 * 7 + 7 * -8 + 11 * 7 + 13 * 0, 1e-5);
  EXPECT_EQ(r.clipped[0], 3.0 + 5.0 + 7.0 + 11.0);
}

}  // namespace
}  // namespace phiquant
