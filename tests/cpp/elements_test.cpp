// The kernels of elements that are not plain integers: every CPU level against the reference, bit for bit, and
// the reference against the formats' definitions.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "core/affine.h"
#include "core/search.h"
#include "support.h"

namespace phiquant {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kBlocks = 5;

// A grid of `format`; tables have `size` random levels, each block its own if `own`.
struct Element {
  Format format;
  int size = 0;
  bool own = false;
  std::vector<float> levels = {};

  Grid grid() {
    if (format == Format::integer) return {-1.0f, 1.0f};
    if (format != Format::table) {
      const float largest = kMinifloats[static_cast<int>(format)].largest;
      return {-largest, largest, Offset::zero_point, format};
    }
    const int64_t tables = own ? kBlocks : 1;
    levels = gaussian(tables * size, static_cast<uint32_t>(size));
    for (int64_t t = 0; t < tables; ++t) std::sort(levels.begin() + t * size, levels.begin() + (t + 1) * size);
    return {levels[0], levels[static_cast<size_t>(size - 1)], Offset::zero_point, format, levels.data(), size, own};
  }
};

const std::vector<Element> kElements = {
    {Format::e4m3fn},
    {Format::e5m2},
    {Format::e2m1},
    {Format::e1m2},
    {Format::e3m0},
    {Format::table, 2},
    {Format::table, 3},
    {Format::table, 16},
    {Format::table, 17},
    {Format::table, 64},
    {Format::table, 65},
    {Format::table, 256},
    {Format::table, 2, true},
    {Format::table, 16, true},
    {Format::table, 40, true},
    {Format::table, 256, true},
    {Format::integer},
};

class ElementLevels : public ::testing::TestWithParam<std::tuple<Level, Dtype, size_t>> {
 protected:
  // Calls test() with values of several block lengths.
  template <class Test>
  void for_lengths(Test test) {
    size_t index;
    std::tie(level, dtype, index) = GetParam();
    element = kElements[index];
    grid = element.grid();
    for (const int64_t length : {1, 7, 16, 33, 64, 4101}) {
      SCOPED_TRACE("blocks of " + std::to_string(length));
      block = length;
      layout = {dtype, kBlocks, block};
      x = store_as(dtype, awkward(kBlocks * block, static_cast<uint32_t>(block)));
      grad = store_as(dtype, awkward(kBlocks * block, 77));
      test();
    }
  }
  const AffineKernels& fast() const {
    const LevelGuard guard(level);
    return affine_kernels();
  }

  Level level;
  Dtype dtype;
  int64_t block;
  Element element{Format::integer};
  Grid grid;
  Layout layout;
  std::vector<char> x;
  std::vector<char> grad;
};

TEST_P(ElementLevels, MapsEqualReference) {
  for_lengths([&] {
    const float scale[kBlocks] = {1.0f, 0.0f, 0.1f, -0.25f, 1e-45f};
    const float inverse[kBlocks] = {1.0f, 0.5f, 3.0f, 0.0f, 100.0f};
    for (const float* by : {static_cast<const float*>(nullptr), &inverse[0]}) {
      const BlockParams params{scale, nullptr, by};
      std::vector<char> y(x.size(), 1), y_ref(x.size(), 2);
      fast().fake_quantize(x.data(), layout, params, grid, y.data());
      affine_ref.fake_quantize(x.data(), layout, params, grid, y_ref.data());
      EXPECT_EQ(y, y_ref) << "fake_quantize";

      fast().fake_quantize_backward(grad.data(), x.data(), layout, params, grid, y.data());
      affine_ref.fake_quantize_backward(grad.data(), x.data(), layout, params, grid, y_ref.data());
      EXPECT_EQ(y, y_ref) << "fake_quantize_backward";

      std::vector<int8_t> codes(static_cast<size_t>(kBlocks * block)), codes_ref(codes.size());
      fast().quantize(x.data(), layout, params, grid, codes.data());
      affine_ref.quantize(x.data(), layout, params, grid, codes_ref.data());
      EXPECT_EQ(codes, codes_ref) << "quantize";

      affine_ref.dequantize(codes_ref.data(), layout, params, grid, y.data());
      affine_ref.fake_quantize(x.data(), layout, params, grid, y_ref.data());
      EXPECT_EQ(y, y_ref) << "decode(encode(x))";
    }
  });
}

TEST_P(ElementLevels, EveryByteIsDecodedAlike) {
  for_lengths([&] {
    std::vector<int8_t> codes(static_cast<size_t>(kBlocks * block));
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(static_cast<uint8_t>(i * 37));
    const float scale[kBlocks] = {1.0f, 0.5f, 0.1f, 2.0f, 3.0f};
    std::vector<float> y(codes.size()), y_ref(codes.size());
    const Layout floats{Dtype::f32, kBlocks, block};
    fast().dequantize(codes.data(), floats, {scale, nullptr}, grid, y.data());
    affine_ref.dequantize(codes.data(), floats, {scale, nullptr}, grid, y_ref.data());
    for (size_t i = 0; i < y.size(); ++i) {
      EXPECT_TRUE(y[i] == y_ref[i] || (std::isnan(y[i]) && std::isnan(y_ref[i]))) << "code " << int{codes[i]};
    }
  });
}

TEST_P(ElementLevels, DynamicEqualsReference) {
  for_lengths([&] {
    if (element.own) return;  // a table per block has no rule that finds its scale
    std::vector<Rule> rules = {Rule::absmean};
    if (grid.qmax > 0.0f) rules.push_back(Rule::absmax);
    if (grid.format == Format::integer) rules.push_back(Rule::twn);
    for (const Rule rule : rules) {
      const RangeSpec spec{grid, rule, Storage::f16};
      std::vector<char> y(x.size(), 1), y_ref(x.size(), 2);
      fast().fake_quantize_dynamic(x.data(), layout, spec, y.data());
      affine_ref.fake_quantize_dynamic(x.data(), layout, spec, y_ref.data());
      EXPECT_EQ(y, y_ref) << "fake_quantize_dynamic";
      fast().fake_quantize_dynamic_backward(grad.data(), x.data(), layout, spec, y.data());
      affine_ref.fake_quantize_dynamic_backward(grad.data(), x.data(), layout, spec, y_ref.data());
      EXPECT_EQ(y, y_ref) << "fake_quantize_dynamic_backward";

      std::vector<int8_t> codes(static_cast<size_t>(kBlocks * block)), codes_ref(codes.size());
      std::vector<float> params(2 * kBlocks), params_ref(2 * kBlocks);
      fast().quantize_dynamic(x.data(), layout, spec, codes.data(), params.data(), params.data() + kBlocks);
      affine_ref.quantize_dynamic(x.data(), layout, spec, codes_ref.data(), params_ref.data(),
                                  params_ref.data() + kBlocks);
      EXPECT_EQ(codes, codes_ref) << "quantize_dynamic";
      EXPECT_EQ(0, std::memcmp(params.data(), params_ref.data(), params.size() * 4)) << "quantize_dynamic's scales";
    }
  });
}

TEST_P(ElementLevels, SearchEqualsReference) {
  for_lengths([&] {
    if (grid.format == Format::integer || element.own || grid.size > 16 || grid.qmax <= 0.0f)
      return;  // searched elsewhere, or not at all
    const RangeSpec spec{grid, Rule::absmax, Storage::f16};
    std::vector<float> found(2 * kBlocks), found_ref(2 * kBlocks);
    {
      const LevelGuard guard(level);
      search_kernels().search(x.data(), layout, spec, false, {}, found.data(), found.data() + kBlocks);
    }
    search_ref.search(x.data(), layout, spec, false, {}, found_ref.data(), found_ref.data() + kBlocks);
    for (size_t i = 0; i < found.size(); ++i) {
      EXPECT_TRUE(found[i] == found_ref[i] || (std::isnan(found[i]) && std::isnan(found_ref[i])));
    }
  });
}

std::string case_name(const ::testing::TestParamInfo<ElementLevels::ParamType>& info) {
  const auto [level, dtype, index] = info.param;
  const Element& e = kElements[index];
  const char* formats[] = {"ternary", "e4m3fn", "e5m2", "e2m1", "e1m2", "e3m0", "table"};
  const char* dtypes[] = {"f32", "bf16", "f16"};
  return level_name(level) + "_" + dtypes[static_cast<int>(dtype)] + "_" + formats[static_cast<int>(e.format)] +
         std::to_string(e.size) + (e.own ? "own" : "");
}

INSTANTIATE_TEST_SUITE_P(All, ElementLevels,
                         ::testing::Combine(::testing::ValuesIn(available_levels()),
                                            ::testing::Values(Dtype::f32, Dtype::bf16, Dtype::f16),
                                            ::testing::Range<size_t>(0, kElements.size())),
                         case_name);

// --- what the reference means ---------------------------------------------------------------------

std::vector<float> nearest(const std::vector<float>& x, const Grid& grid) {
  const float one = 1.0f;
  std::vector<float> y(x.size());
  affine_ref.fake_quantize(x.data(), {Dtype::f32, 1, static_cast<int64_t>(x.size())}, {&one, nullptr}, grid, y.data());
  return y;
}

TEST(Elements, MinifloatsRoundToEvenAndSaturate) {
  const Grid e4m3 = Element{Format::e4m3fn}.grid();
  EXPECT_EQ(nearest({464.0f, 1e9f, -kInf, 0x1p-10f, 0x1.8p-9f, 17.0f, 19.0f}, e4m3),
            (std::vector<float>{448.0f, 448.0f, -448.0f, 0.0f, 0x1p-8f, 16.0f, 20.0f}));
  const Grid e2m1 = Element{Format::e2m1}.grid();
  EXPECT_EQ(nearest({0.25f, 0.75f, 2.5f, 3.5f, 5.0f, 7.0f, -1.25f}, e2m1),
            (std::vector<float>{0.0f, 1.0f, 2.0f, 4.0f, 4.0f, 6.0f, -1.0f}));
}

TEST(Elements, CodesOfMinifloatsAreTheirBits) {
  const float one = 1.0f;
  const std::vector<float> x = {0.0f, -0.0f, 0.5f, 1.0f, 1.5f, 6.0f, -6.0f};
  std::vector<int8_t> codes(x.size());
  affine_ref.quantize(x.data(), {Dtype::f32, 1, 7}, {&one, nullptr}, Element{Format::e2m1}.grid(), codes.data());
  EXPECT_EQ(codes, (std::vector<int8_t>{0, 8, 1, 2, 3, 7, 15}));
}

TEST(Elements, TiesOfTablesGoUp) {
  const std::vector<float> levels = {-1.0f, 0.0f, 3.0f};
  const Grid grid{-1.0f, 3.0f, Offset::zero_point, Format::table, levels.data(), 3, false};
  EXPECT_EQ(nearest({-0.5f, 1.5f, 1.4999999f, 99.0f, -99.0f, std::nanf("")}, grid),
            (std::vector<float>{0.0f, 3.0f, 0.0f, 3.0f, -1.0f, -1.0f}));
}

TEST(Elements, TwnKeepsWhatExceedsItsThreshold) {
  const std::vector<float> x = {1.0f, -3.0f, 0.5f, 2.0f, 0.0f, -1.5f, 0.9f, 1.1f};  // mean 1.25, threshold 0.875
  std::vector<float> y(x.size());
  affine_ref.fake_quantize_dynamic(x.data(), {Dtype::f32, 1, 8}, {{-1.0f, 1.0f}, Rule::twn, Storage::f32}, y.data());
  const float s = (1.0f + 3.0f + 2.0f + 1.5f + 0.9f + 1.1f) / 6.0f;
  const std::vector<float> expected = {s, -s, 0.0f, s, 0.0f, -s, s, s};
  for (size_t i = 0; i < x.size(); ++i) EXPECT_FLOAT_EQ(y[i], expected[i]);
}

TEST(Elements, SumsOfPiecesAreTheSumOfTheBlock) {
  const int64_t n = 3 * kSumPiece + 100;
  const std::vector<float> x = gaussian(n, 5);
  double whole;
  int64_t count;
  affine_ref.abs_sum(x.data(), {Dtype::f32, 1, n}, nullptr, &whole, &count);
  EXPECT_EQ(count, n);
  std::vector<double> sums(4);
  std::vector<int64_t> counts(4);
  for (int64_t p = 0; p < 4; ++p) {
    const int64_t length = std::min(kSumPiece, n - p * kSumPiece);
    affine_ref.abs_sum(x.data() + p * kSumPiece, {Dtype::f32, 1, length}, nullptr, &sums[static_cast<size_t>(p)],
                       &counts[static_cast<size_t>(p)]);
  }
  float of_pieces;
  float of_whole;
  means_from_sums(sums.data(), counts.data(), 1, 4, 1.0f, &of_pieces);
  means_from_sums(&whole, &count, 1, 1, 1.0f, &of_whole);
  EXPECT_EQ(of_pieces, of_whole);
  EXPECT_EQ(((sums[0] + sums[1]) + sums[2]) + sums[3], whole);
}

}  // namespace
}  // namespace phiquant
