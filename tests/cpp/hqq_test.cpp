// Half-quadratic quantization: levels equal, the power against std::pow, never worse than the start, awkward blocks.
#include "core/hqq.h"

#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <cstring>

#include "core/affine.h"
#include "core/power.inl"
#include "core/scalar_lanes.h"
#include "support.h"

namespace phiquant {
namespace {

constexpr Rule kRules[] = {Rule::absmax, Rule::signed_absmax, Rule::zero_point, Rule::minimum};

RangeSpec spec_of(Rule rule, int bits, Storage storage) {
  const float top = static_cast<float>((1 << bits) - 1);
  const bool is_signed = rule == Rule::absmax || rule == Rule::signed_absmax;
  const float low = is_signed ? -std::ldexp(1.0f, bits - 1) : 0.0f;
  return {{low, low + top, rule == Rule::minimum ? Offset::minimum : Offset::zero_point}, rule, storage};
}

RangeSpec floats_of(Format format) {
  const float largest = kMinifloats[static_cast<int>(format)].largest;
  return {{-largest, largest, Offset::zero_point, format}, Rule::absmax, Storage::f32};
}

// [scales, offsets], solved from the rule's own range by `kernels`, or that range.
std::vector<float> solve(const std::vector<char>& x, Layout layout, RangeSpec spec, const HqqKernels* kernels) {
  std::vector<float> found(static_cast<size_t>(2 * layout.blocks));
  affine_ref.choose_range(x.data(), layout, spec, found.data(), found.data() + layout.blocks);
  if (kernels) kernels->solve(x.data(), layout, spec, {}, found.data(), found.data() + layout.blocks);
  return found;
}

TEST(Hqq, EveryLevelGivesTheSameBits) {
  std::vector<RangeSpec> specs = {floats_of(Format::e2m1), floats_of(Format::e4m3fn)};
  for (const Rule rule : kRules) {
    for (const int bits : {2, 4, 8}) {
      specs.push_back(spec_of(rule, bits, Storage::f32));
      specs.push_back(spec_of(rule, bits, Storage::f16));
    }
  }
  const std::vector<float> levels = {-1.0f, -0.4f, 0.0f, 0.3f, 0.7f, 1.0f};
  specs.push_back({{-1.0f, 1.0f, Offset::zero_point, Format::table, levels.data(), 6}, Rule::absmax, Storage::bf16});
  for (const int64_t block : {1, 3, 16, 17, 32, 100, 256, 257, 1001, 5000}) {
    const int64_t blocks = block > 256 ? 2 : 18;
    std::vector<float> values = gaussian(blocks * block, static_cast<uint32_t>(block), 0.02f);
    const std::vector<float> strange = awkward(block, 7);
    std::copy(strange.begin(), strange.end(), values.begin());  // one awkward block, the rest finite
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      const std::vector<char> x = store_as(dtype, values);
      const Layout layout{dtype, blocks, block};
      for (const RangeSpec& spec : specs) {
        const std::vector<float> expected = solve(x, layout, spec, &hqq_ref);
        for (const Level level : available_levels()) {
          const LevelGuard guard(level);
          const std::vector<float> found = solve(x, layout, spec, &hqq_kernels());
          ASSERT_EQ(0, std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)))
              << level_name(level) << " block " << block << " rule " << static_cast<int>(spec.rule) << " format "
              << static_cast<int>(spec.grid.format) << " qmax " << spec.grid.qmax;
        }
      }
    }
  }
}

double error(const float* x, int64_t n, Params p, const Grid& grid, double unit) {
  std::vector<float> y(static_cast<size_t>(n));
  affine_ref.fake_quantize(x, {Dtype::f32, 1, n}, {&p.scale, &p.offset}, grid, y.data());
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += std::pow(std::abs(double{y[static_cast<size_t>(i)]} - x[i]) / unit, 0.7);
  return sum;
}

// A block does not depend on its neighbours in the lanes, nor on how many there are.
TEST(Hqq, NoBlockIsWorseAndNoneDependsOnItsNeighbours) {
  for (const Rule rule : kRules) {
    for (const int bits : {2, 3, 4, 8}) {
      double before = 0.0, after = 0.0;
      for (const Storage storage : {Storage::f32, Storage::bf16, Storage::f16}) {
        for (const int64_t block : {32, 600}) {
          const int64_t blocks = 21;
          const std::vector<float> x = gaussian(blocks * block, static_cast<uint32_t>(bits), 0.02f);
          const std::vector<char> bytes = store_as(Dtype::f32, x);
          const RangeSpec spec = spec_of(rule, bits, storage);
          const std::vector<float> start = solve(bytes, {Dtype::f32, blocks, block}, spec, nullptr);
          const std::vector<float> found = solve(bytes, {Dtype::f32, blocks, block}, spec, &hqq_kernels());
          for (int64_t b = 0; b < blocks; ++b) {
            const size_t at = static_cast<size_t>(b);
            const size_t other = static_cast<size_t>(blocks + b);
            const double unit = std::abs(start[at]);
            const double was = error(&x[at * block], block, {start[at], start[other]}, spec.grid, unit);
            const double is = error(&x[at * block], block, {found[at], found[other]}, spec.grid, unit);
            ASSERT_LE(is, was) << static_cast<int>(rule) << " " << bits << " block " << b;
            before += was;
            after += is;
            const std::vector<float> own(x.begin() + b * block, x.begin() + (b + 1) * block);
            const std::vector<float> alone = solve(store_as(Dtype::f32, own), {Dtype::f32, 1, block}, spec, &hqq_ref);
            ASSERT_EQ(alone[0], found[at]);
            ASSERT_EQ(alone[1], found[other]);
          }
        }
      }
      EXPECT_LT(after, (bits <= 4 ? 1.0 : 1.0001) * before) << static_cast<int>(rule) << " " << bits;
    }
  }
}

TEST(Hqq, ThePowerIsThatOfTheLibrary) {
  for (const float exponent : {-0.3f, -0.5f, -0.9f, 0.0f}) {
    for (float x = 1e-36f; x < 1e30f; x *= 1.0737f) {
      const double expected = std::pow(double{x}, double{exponent});
      ASSERT_NEAR(Power<Scalar>::raise(x, exponent) / expected, 1.0, 1e-5) << x << " " << exponent;
    }
  }
  EXPECT_EQ(Power<Scalar>::raise(0.0f, -0.3f), Power<Scalar>::raise(FLT_MIN, -0.3f));
}

TEST(Hqq, ZerosTinyHugeAndNotFinite) {
  for (const Rule rule : kRules) {
    const RangeSpec spec = spec_of(rule, 4, Storage::f16);
    const auto scale = [&](const std::vector<float>& x) {
      return solve(store_as(Dtype::f32, x), {Dtype::f32, 1, static_cast<int64_t>(x.size())}, spec, &hqq_kernels())[0];
    };
    EXPECT_EQ(scale(std::vector<float>(32, 0.0f)), 0.0f);
    EXPECT_EQ(scale({1e-45f, 0.0f}), 0.0f);
    EXPECT_TRUE(std::isfinite(scale({3e38f, -1e38f, 1.0f})));
    EXPECT_TRUE(std::isfinite(scale(std::vector<float>(40, 7.0f))));
    for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
      EXPECT_TRUE(std::isnan(scale({1.0f, bad, 2.0f})));
      std::vector<float> row = gaussian(400, 3);
      row[333] = bad;
      EXPECT_TRUE(std::isnan(scale(row)));
    }
  }
}

}  // namespace
}  // namespace phiquant
