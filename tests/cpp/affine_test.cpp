// Every kernel at every CPU level against the reference, bit for bit: on awkward values, odd block
// lengths, all dtypes, all rules. Then the meaning of the reference itself, on values done by hand.
#include "core/affine.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "support.h"

namespace phiquant {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kBlocks = 5;

Grid grid_of(Rule rule, int bits) {
  const float levels = static_cast<float>((1 << bits) - 1);
  switch (rule) {
    case Rule::absmax:
    case Rule::signed_absmax:
      return {-static_cast<float>(1 << (bits - 1)), static_cast<float>((1 << (bits - 1)) - 1), Offset::zero_point};
    case Rule::zero_point:
      return {0.0f, levels, Offset::zero_point};
    case Rule::minimum:
      return {0.0f, levels, Offset::minimum};
    default:
      break;
  }
  return {};
}

class AffineLevels : public ::testing::TestWithParam<std::tuple<Level, Dtype, Rule, int64_t>> {
 protected:
  void SetUp() override {
    std::tie(level, dtype, rule, block) = GetParam();
    layout = {dtype, kBlocks, block};
    x = store_as(dtype, awkward(kBlocks * block, static_cast<uint32_t>(block)));
    grad = store_as(dtype, awkward(kBlocks * block, 77));
  }

  const AffineKernels& fast() const {
    const LevelGuard guard(level);
    return affine_kernels();
  }
  std::vector<char> bytes() const { return std::vector<char>(x.size(), 1); }
  RangeSpec spec(int bits, Storage storage) const { return {grid_of(rule, bits), rule, storage}; }

  Level level;
  Dtype dtype;
  Rule rule;
  int64_t block;
  Layout layout;
  std::vector<char> x;
  std::vector<char> grad;
};

TEST_P(AffineLevels, MinMaxEqualsReference) {
  std::vector<float> lo(kBlocks), hi(kBlocks), lo_ref(kBlocks), hi_ref(kBlocks);
  fast().min_max(x.data(), layout, lo.data(), hi.data());
  affine_ref.min_max(x.data(), layout, lo_ref.data(), hi_ref.data());
  EXPECT_EQ(lo, lo_ref);
  EXPECT_EQ(hi, hi_ref);
}

TEST_P(AffineLevels, RangesEqualReference) {
  for (const Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::e8m0, Storage::e4m3}) {
    for (const int bits : {2, 3, 4, 8}) {
      std::vector<float> a(2 * kBlocks), b(2 * kBlocks);
      fast().choose_range(x.data(), layout, spec(bits, storage), a.data(), a.data() + kBlocks);
      affine_ref.choose_range(x.data(), layout, spec(bits, storage), b.data(), b.data() + kBlocks);
      EXPECT_EQ(0, std::memcmp(a.data(), b.data(), a.size() * 4)) << bits << " bits";
    }
  }
}

TEST_P(AffineLevels, MapsEqualReference) {
  for (const int bits : {2, 3, 4, 5, 6, 7, 8}) {
    const RangeSpec s = spec(bits, Storage::f16);
    std::vector<float> scale(kBlocks), offset(kBlocks);
    affine_ref.choose_range(x.data(), layout, s, scale.data(), offset.data());
    scale[1] = 0.0f;    // a block of zeros
    scale[2] = 0.1f;    // values far outside
    scale[3] = -0.25f;  // negative scales are legal (Q4_0)
    scale[4] = 1e-45f;  // the reciprocal would overflow
    const BlockParams params{scale.data(), offset.data()};

    std::vector<char> y = bytes(), y_ref = bytes();
    fast().fake_quantize(x.data(), layout, params, s.grid, y.data());
    affine_ref.fake_quantize(x.data(), layout, params, s.grid, y_ref.data());
    EXPECT_EQ(y, y_ref) << "fake_quantize, " << bits << " bits";

    fast().fake_quantize_backward(grad.data(), x.data(), layout, params, s.grid, y.data());
    affine_ref.fake_quantize_backward(grad.data(), x.data(), layout, params, s.grid, y_ref.data());
    EXPECT_EQ(y, y_ref) << "fake_quantize_backward, " << bits << " bits";

    fast().fake_quantize_dynamic(x.data(), layout, s, y.data());
    affine_ref.fake_quantize_dynamic(x.data(), layout, s, y_ref.data());
    EXPECT_EQ(y, y_ref) << "fake_quantize_dynamic, " << bits << " bits";

    fast().fake_quantize_dynamic_backward(grad.data(), x.data(), layout, s, y.data());
    affine_ref.fake_quantize_dynamic_backward(grad.data(), x.data(), layout, s, y_ref.data());
    EXPECT_EQ(y, y_ref) << "fake_quantize_dynamic_backward, " << bits << " bits";

    std::vector<int8_t> codes(static_cast<size_t>(kBlocks * block)), codes_ref(codes.size());
    fast().quantize(x.data(), layout, params, s.grid, codes.data());
    affine_ref.quantize(x.data(), layout, params, s.grid, codes_ref.data());
    EXPECT_EQ(codes, codes_ref) << "quantize, " << bits << " bits";

    fast().dequantize(codes_ref.data(), layout, params, s.grid, y.data());
    affine_ref.dequantize(codes_ref.data(), layout, params, s.grid, y_ref.data());
    EXPECT_EQ(y, y_ref) << "dequantize, " << bits << " bits";

    // One decode: fake-quantize is encode and decode.
    affine_ref.fake_quantize(x.data(), layout, params, s.grid, y.data());
    EXPECT_EQ(y, y_ref) << "decode(encode(x)), " << bits << " bits";

    // One pass finds what two do, and marks the blocks that hold a value that is not finite.
    std::vector<float> found_scale(kBlocks), found_offset(kBlocks);
    affine_ref.choose_range(x.data(), layout, s, scale.data(), offset.data());
    affine_ref.quantize(x.data(), layout, params, s.grid, codes_ref.data());
    const size_t bytes_per_block = x.size() / kBlocks;
    std::vector<bool> finite(kBlocks);
    for (size_t b = 0; b < kBlocks; ++b) {
      const Layout one{dtype, 1, block};
      finite[b] = affine_ref.all_finite(x.data() + b * bytes_per_block, one);
      EXPECT_EQ(fast().all_finite(x.data() + b * bytes_per_block, one), finite[b]);
    }
    for (const AffineKernels* kernels : {&fast(), &affine_ref}) {
      kernels->quantize_dynamic(x.data(), layout, s, codes.data(), found_scale.data(), found_offset.data());
      EXPECT_EQ(codes, codes_ref) << "quantize_dynamic, " << bits << " bits";
      for (size_t b = 0; b < kBlocks; ++b) {
        EXPECT_EQ(std::isnan(found_scale[b]), !finite[b]);
        if (finite[b]) {
          EXPECT_EQ(found_scale[b], scale[b]) << "quantize_dynamic's scales, " << bits << " bits";
        }
      }
      EXPECT_EQ(found_offset, offset) << "quantize_dynamic's offsets, " << bits << " bits";
    }
  }
}

std::string case_name(const ::testing::TestParamInfo<AffineLevels::ParamType>& info) {
  const auto [level, dtype, rule, block] = info.param;
  const std::array<const char*, 3> dtypes = {"f32", "bf16", "f16"};
  const std::array<const char*, 4> rules = {"absmax", "signed_absmax", "zero_point", "minimum"};
  return level_name(level) + "_" + dtypes[static_cast<size_t>(dtype)] + "_" + rules[static_cast<size_t>(rule)] + "_" +
         std::to_string(block);
}

INSTANTIATE_TEST_SUITE_P(
    All, AffineLevels,
    ::testing::Combine(::testing::ValuesIn(available_levels()), ::testing::Values(Dtype::f32, Dtype::bf16, Dtype::f16),
                       ::testing::Values(Rule::absmax, Rule::signed_absmax, Rule::zero_point, Rule::minimum),
                       ::testing::Values<int64_t>(1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 4101)),
    case_name);

// --- what the reference means ---------------------------------------------------------------------

std::vector<float> fake_quantize(std::vector<float> x, float scale, float offset, Grid grid) {
  std::vector<float> y(x.size());
  affine_ref.fake_quantize(x.data(), {Dtype::f32, 1, static_cast<int64_t>(x.size())}, {&scale, &offset}, grid,
                           y.data());
  return y;
}

Params choose(const std::vector<float>& x, RangeSpec spec) {
  Params p{};
  affine_ref.choose_range(x.data(), {Dtype::f32, 1, static_cast<int64_t>(x.size())}, spec, &p.scale, &p.offset);
  return p;
}

TEST(Affine, TiesGoToEven) {
  const Grid int4{-8, 7, Offset::zero_point};
  EXPECT_EQ(fake_quantize({0.5f, 1.5f, 2.5f, -0.5f, -1.5f}, 1.0f, 0.0f, int4),
            (std::vector<float>{0.0f, 2.0f, 2.0f, 0.0f, -2.0f}));
}

TEST(Affine, ClampsToTheGrid) {
  const Grid int4{-8, 7, Offset::zero_point};
  EXPECT_EQ(fake_quantize({100.0f, -100.0f, kInf, -kInf, 1e30f, std::nanf("")}, 1.0f, 0.0f, int4),
            (std::vector<float>{7.0f, -8.0f, 7.0f, -8.0f, 7.0f, -8.0f}));
}

TEST(Affine, ZeroPointShiftsCodes) {
  const Grid uint2{0, 3, Offset::zero_point};
  EXPECT_EQ(fake_quantize({-1.0f, 0.0f, 0.9f, 5.0f}, 0.5f, 1.0f, uint2), (std::vector<float>{-0.5f, 0.0f, 1.0f, 1.0f}));
}

TEST(Affine, MinimumIsTheValueOfCodeZero) {
  const Grid uint2{0, 3, Offset::minimum};
  EXPECT_EQ(fake_quantize({10.0f, 10.3f, 10.8f, 99.0f}, 0.5f, 10.0f, uint2),
            (std::vector<float>{10.0f, 10.5f, 11.0f, 11.5f}));
}

TEST(Affine, ScaleOfZeroDecodesToZero) {
  const Grid int4{-8, 7, Offset::zero_point};
  EXPECT_EQ(fake_quantize({1.0f, -3.0f, 0.0f}, 0.0f, 0.0f, int4), (std::vector<float>{0.0f, 0.0f, 0.0f}));
}

TEST(Affine, MaskIsTakenBeforeTheClampAndSelects) {
  const std::vector<float> x = {7.4f, 7.6f, -8.4f, -8.6f, std::nanf(""), 0.0f};
  const std::vector<float> grad = {1.0f, kInf, 2.0f, std::nanf(""), 5.0f, 3.0f};
  const float scale = 1.0f;
  std::vector<float> dx(x.size());
  affine_ref.fake_quantize_backward(grad.data(), x.data(), {Dtype::f32, 1, 6}, {&scale, nullptr},
                                    {-8, 7, Offset::zero_point}, dx.data());
  EXPECT_EQ(dx, (std::vector<float>{1.0f, 0.0f, 2.0f, 0.0f, 0.0f, 3.0f}));
}

TEST(Affine, SignedAbsmaxHoldsTheExtremeExactly) {
  const RangeSpec q4_0{{-8, 7, Offset::zero_point}, Rule::signed_absmax, Storage::f16};
  EXPECT_EQ(choose({1.0f, 4.0f, -2.0f}, q4_0).scale, -0.5f);
  EXPECT_EQ(choose({1.0f, 2.0f, -4.0f}, q4_0).scale, 0.5f);
  EXPECT_EQ(choose({4.0f, 2.0f, -4.0f}, q4_0).scale, 0.5f) << "of two equal magnitudes the negative is the anchor";
}

TEST(Affine, ZeroPointRangeHoldsZero) {
  const RangeSpec uint4{{0, 15, Offset::zero_point}, Rule::zero_point, Storage::f32};
  const Params p = choose({3.0f, 15.0f, 7.0f}, uint4);
  EXPECT_EQ(p.scale, 1.0f);
  EXPECT_EQ(p.offset, 0.0f);
  EXPECT_EQ(choose({-15.0f, -3.0f}, uint4).offset, 15.0f);
}

TEST(Affine, ValuesThatAreNotFiniteAreSeen) {
  for (const float bad : {kInf, -kInf, std::nanf("")}) {
    std::vector<float> x = gaussian(64, 1);
    EXPECT_TRUE(affine_ref.all_finite(x.data(), {Dtype::f32, 2, 32}));
    x[40] = bad;
    EXPECT_FALSE(affine_ref.all_finite(x.data(), {Dtype::f32, 2, 32}));
    std::vector<int8_t> codes(64);
    std::vector<float> scale(2), offset(2);
    const RangeSpec spec{{-8, 7, Offset::zero_point}, Rule::absmax, Storage::f32};
    affine_ref.quantize_dynamic(x.data(), {Dtype::f32, 2, 32}, spec, codes.data(), scale.data(), offset.data());
    EXPECT_GT(scale[0], 0.0f);
    EXPECT_TRUE(std::isnan(scale[1]));
  }
}

TEST(Affine, StoredScaleIsTheGrid) {
  const RangeSpec spec{{-8, 7, Offset::zero_point}, Rule::absmax, Storage::f16};
  const float scale = choose({0.1f, -0.05f}, spec).scale;
  EXPECT_EQ(scale, to_float(from_float<f16>(0.1f / 7.0f)));
  EXPECT_NE(scale, 0.1f / 7.0f);
}

TEST(Affine, RangesOfNothingOfNanAndOfTheHuge) {
  const RangeSpec spec{{-8, 7, Offset::zero_point}, Rule::absmax, Storage::f16};
  EXPECT_EQ(choose({}, spec).scale, 0.0f);
  EXPECT_EQ(choose({std::nanf(""), std::nanf("")}, spec).scale, 0.0f);
  EXPECT_EQ(choose({0.0f, -0.0f}, spec).scale, 0.0f);
  EXPECT_FALSE(std::signbit(choose({0.0f, -0.0f}, spec).scale));
  EXPECT_EQ(choose({1e30f, 1.0f}, spec).scale, 65504.0f) << "the largest fp16, never infinity";
}

}  // namespace
}  // namespace phiquant
