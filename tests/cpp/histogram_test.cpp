// Histograms at every CPU level against the reference, and the theorem on which merging rests.
#include "core/histogram.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "support.h"

namespace phiquant {
namespace {

struct Filled {
  int exponent;
  float lo, hi;
  std::vector<int64_t> counts;
  bool operator==(const Filled&) const = default;
};

Filled fill(const HistogramKernels& kernels, Dtype dtype, const std::vector<float>& values, int64_t bins) {
  const std::vector<char> x = store_as(dtype, values);
  std::vector<int32_t> tables(static_cast<size_t>(kTables * table_length(2 * bins)));
  DyadicBins b{tables.data(), bins};
  kernels.dyadic(x.data(), dtype, static_cast<int64_t>(values.size()), b);
  Filled result{b.exponent, b.lo, b.hi, std::vector<int64_t>(static_cast<size_t>(2 * bins))};
  add_tables(tables.data(), 2 * bins, result.counts.data());
  return result;
}

std::vector<int64_t> fill_linear(const HistogramKernels& kernels, Dtype dtype, const std::vector<float>& values,
                                 LinearBins b) {
  const std::vector<char> x = store_as(dtype, values);
  std::vector<int32_t> tables(static_cast<size_t>(kTables * table_length(b.bins)));
  kernels.linear(x.data(), dtype, static_cast<int64_t>(values.size()), b, tables.data());
  std::vector<int64_t> counts(static_cast<size_t>(b.bins));
  add_tables(tables.data(), b.bins, counts.data());
  return counts;
}

// Every level's kernels, and values from tiny to huge so that the bins widen on the way.
class HistogramLevels : public ::testing::TestWithParam<Level> {
 protected:
  const HistogramKernels& fast() const {
    const LevelGuard guard(GetParam());
    return histogram_kernels();
  }
  static std::vector<float> growing(int64_t n, uint32_t seed) {
    std::vector<float> values = awkward(n, seed);
    for (size_t i = 0; i < values.size(); ++i) values[i] *= std::exp2(static_cast<float>(i * 40 / values.size()) - 20);
    return values;
  }
};

TEST_P(HistogramLevels, EqualReference) {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    for (const int64_t n : {0, 1, 3, 7, 8, 15, 16, 17, 31, 2047, 2048, 2049, 5000, 20011}) {
      for (const int64_t bins : {4, 64, 2048, 16384}) {
        EXPECT_EQ(fill(fast(), dtype, awkward(n, 1), bins), fill(histogram_ref, dtype, awkward(n, 1), bins)) << n;
        EXPECT_EQ(fill(fast(), dtype, growing(n, 2), bins), fill(histogram_ref, dtype, growing(n, 2), bins)) << n;
      }
      for (const LinearBins b : {LinearBins{-1.0f, 2.0f, 1}, LinearBins{-3.0f, 3.0f, 2048}, {0.0f, 0.7f, 32768}}) {
        EXPECT_EQ(fill_linear(fast(), dtype, awkward(n, 3), b), fill_linear(histogram_ref, dtype, awkward(n, 3), b));
      }
    }
  }
}

TEST_P(HistogramLevels, OnePassIsTheSumOfParts) {
  const std::vector<float> all = growing(9000, 5);
  for (const int64_t bins : {4, 256, 2048}) {
    const Filled whole = fill(fast(), Dtype::f32, all, bins);
    std::vector<int64_t> sum(whole.counts.size());
    for (const auto& [begin, end] : {std::pair{0, 10}, {10, 4000}, {4000, 4001}, {4001, 9000}}) {
      Filled part = fill(fast(), Dtype::f32, {all.begin() + begin, all.begin() + end}, bins);
      ASSERT_LE(part.exponent, whole.exponent);
      coarsen(part.counts.data(), bins, whole.exponent - part.exponent);
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += part.counts[i];
    }
    EXPECT_EQ(sum, whole.counts);
  }
}

INSTANTIATE_TEST_SUITE_P(All, HistogramLevels, ::testing::ValuesIn(available_levels()),
                         [](const auto& info) { return level_name(info.param); });

TEST(Histogram, PlacesByHand) {
  // absmax 3.5 < 4 * 2^0: bins [0, 1) .. [3, 4) on each side
  const Filled f = fill(histogram_ref, Dtype::f32,
                        {0.0f, -0.0f, 0.5f, 1.0f, -1.0f, 3.5f, -1e-40f, std::nanf(""), INFINITY, -INFINITY}, 4);
  EXPECT_EQ(f.exponent, 0);
  EXPECT_EQ(f.counts, (std::vector<int64_t>{0, 0, 1, 2, 2, 1, 0, 1}));
  EXPECT_EQ(f.lo, -1.0f);
  EXPECT_EQ(f.hi, 3.5f);
  // 4 itself needs bins of 2
  EXPECT_EQ(fill(histogram_ref, Dtype::f32, {4.0f, 3.9f, -0.1f}, 4).counts,
            (std::vector<int64_t>{0, 0, 0, 1, 0, 1, 1, 0}));
}

TEST(Histogram, ExponentIsTheSmallestThatHolds) {
  for (const float absmax : {1e-45f, 1e-38f, 0.1f, 1.0f, 1.5f, 2.0f, 1e30f, 3.4e38f}) {
    for (const int64_t bins : {4, 2048, 16384}) {
      const int e = dyadic_exponent(absmax, bins);
      EXPECT_LT(absmax, std::ldexp(static_cast<double>(bins), e));
      if (e > kMinExponent) {
        EXPECT_GE(absmax, std::ldexp(static_cast<double>(bins), e - 1));
      }
    }
  }
  EXPECT_EQ(dyadic_exponent(0.0f, 2048), kMinExponent);
}

}  // namespace
}  // namespace phiquant
