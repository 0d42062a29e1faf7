// k-means against every way to cut small data, with and without weights; points and prefix sums; the search from
// coarse to fine against one without it; sums by code.
#include "core/kmeans.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "core/kmeans_lloyd.h"
#include "support.h"

namespace phiquant {
namespace {

// The order of tasks must not matter.
const Parallel kBackward = [](int64_t count, const std::function<void(int64_t)>& task) {
  for (int64_t i = count; i-- > 0;) task(i);
};

Points points_of(const std::vector<float>& x, const std::vector<float>& weights = {}, bool skip_zero = false) {
  return distinct(x.data(), Dtype::f32, weights.empty() ? nullptr : weights.data(), static_cast<int64_t>(x.size()),
                  skip_zero, kBackward);
}

// Error of the points about the nearest level.
double error_of(const Points& points, const std::vector<float>& levels) {
  double total = 0.0;
  for (size_t i = 0; i < points.value.size(); ++i) {
    double least = INFINITY;
    for (const float level : levels) least = std::min(least, std::pow(double{points.value[i]} - level, 2));
    total += points.weight[i] * least;
  }
  return total;
}

// Least error of the points from `from` on in k runs, trying every end of the first.
double brute_force(const Points& points, int64_t from, int64_t k) {
  if (from == points.size()) return 0.0;
  if (k == 0) return INFINITY;
  double best = INFINITY;
  double w = 0.0, s = 0.0, s2 = 0.0;
  for (int64_t to = from; to < points.size(); ++to) {
    const double v = points.value[to], h = points.weight[to];
    w += h, s += h * v, s2 += h * v * v;
    best = std::min(best, std::max(0.0, s2 - s * s / w) + brute_force(points, to + 1, k - 1));
  }
  return best;
}

std::vector<float> exact(const Points& points, int64_t k) {
  std::vector<float> levels(static_cast<size_t>(k));
  kmeans_exact(points, k, levels.data(), kBackward);
  return levels;
}

TEST(Distinct, SortsMergesAndLeavesOut) {
  const std::vector<float> x = {2.0f, -1.0f, 0.0f, 2.0f, -0.0f, -1e-40f, 2.0f};
  const Points all = points_of(x);
  EXPECT_EQ(all.value, (LargeVector<float>{-1.0f, -1e-40f, 0.0f, 2.0f}));
  EXPECT_EQ(all.weight, (LargeVector<double>{1, 1, 2, 3}));
  EXPECT_EQ(points_of(x, {}, true).value, (LargeVector<float>{-1.0f, -1e-40f, 2.0f}));
  const Points weighted = points_of(x, {1, 0, 0.5f, 2, 0.25f, 0, 4});
  EXPECT_EQ(weighted.value, (LargeVector<float>{0.0f, 2.0f}));
  EXPECT_EQ(weighted.weight, (LargeVector<double>{0.75, 7}));
  EXPECT_EQ(points_of(x, std::vector<float>(7, 0.0f)).weight, all.weight);
  EXPECT_EQ(points_of({}).size(), 0);
}

// 40 000 16-bit values are counted; the same as float32 sorted by radix, 900 by comparison.
TEST(Distinct, CountingAndSortingAgree) {
  for (const int64_t n : {int64_t{900}, int64_t{5000}, int64_t{40000}}) {
    const std::vector<float> x = gaussian(n, 1);
    const std::vector<float> h = [&] {
      std::vector<float> weights = gaussian(n, 2);
      for (float& w : weights) w = std::round(4 * std::fabs(w));  // whole: sums in any order are the same
      return weights;
    }();
    for (const Dtype dtype : {Dtype::bf16, Dtype::f16}) {
      const std::vector<char> stored = store_as(dtype, x);
      std::vector<float> rounded(x.size());
      for (size_t i = 0; i < x.size(); ++i) {
        rounded[i] = dtype == Dtype::bf16 ? to_float(reinterpret_cast<const bf16*>(stored.data())[i])
                                          : to_float(reinterpret_cast<const f16*>(stored.data())[i]);
      }
      for (const float* weights : {static_cast<const float*>(nullptr), h.data()}) {
        const Points a = distinct(stored.data(), dtype, weights, n, false, kBackward);
        const Points b = distinct(rounded.data(), Dtype::f32, weights, n, false, kBackward);
        EXPECT_EQ(a.value, b.value);
        EXPECT_EQ(a.weight, b.weight);
      }
    }
  }
}

TEST(Prefix, CostIsTheSquaredErrorAboutTheMean) {
  const Points points = points_of({1.0f, 2.0f, 4.0f, 4.0f, 8.0f, 1e18f});
  const Prefix prefix(points, serial);
  EXPECT_DOUBLE_EQ(prefix.cost(0, 3), 6.75);  // 1 2 4 4 about 2.75
}

TEST(Exact, EqualsBruteForce) {
  std::mt19937 engine(3);
  for (int trial = 0; trial < 60; ++trial) {
    const int64_t n = 1 + static_cast<int64_t>(engine() % 10);
    std::vector<float> x = gaussian(n, static_cast<uint32_t>(trial));
    std::vector<float> h(x.size());
    for (float& w : h) w = static_cast<float>(1 + engine() % 3);
    if (trial % 3 == 0) x.back() = 1e4f;
    const Points points = trial % 2 ? points_of(x) : points_of(x, h);
    for (int64_t k = 1; k <= 5; ++k) {
      const double expected = brute_force(points, 0, k);
      EXPECT_NEAR(error_of(points, exact(points, k)), expected, 1e-5 * expected + 1e-9) << trial << " " << k;
    }
  }
}

// Dynamic programming over all places, as the definition says.
double quadratic(const Points& points, int64_t k) {
  const Prefix prefix(points, serial);
  std::vector<double> before(static_cast<size_t>(points.size() + 1), INFINITY);
  before[0] = 0.0;
  for (int64_t c = 0; c < k; ++c) {
    std::vector<double> layer(before.size(), INFINITY);
    for (int64_t b = 1; b <= points.size(); ++b) {
      for (int64_t a = 0; a < b; ++a) layer[b] = std::min(layer[b], before[a] + prefix.cost(a, b));
    }
    before = std::move(layer);
  }
  return before.back();
}

TEST(Exact, CoarseToFineLosesNothing) {
  for (const uint32_t seed : {1u, 2u, 3u, 4u}) {
    std::vector<float> x = gaussian(3000, seed);
    for (size_t i = 0; i < x.size(); ++i) {
      if (seed == 2) x[i] = std::pow(x[i], 5.0f);                               // heavy tails
      if (seed == 3) x[i] = 0.01f * x[i] + static_cast<float>(i % 9);           // clumps, fewer and more than levels
      if (seed == 4) x[i] = std::round(1000 * x[i]) / 1000 + (i % 2 ? 0 : 50);  // two far halves
    }
    const Points points = points_of(x);
    ASSERT_GT(points.size(), 2048);
    for (const int64_t k : {2, 5, 12}) {
      const double expected = quadratic(points, k);
      EXPECT_NEAR(error_of(points, exact(points, k)), expected, 1e-6 * expected) << seed << " " << k;
    }
  }
}

TEST(Exact, RepeatsTheLargestLevel) {
  EXPECT_EQ(exact(points_of({5.0f, 1.0f}), 4), (std::vector<float>{1, 5, 5, 5}));
  EXPECT_EQ(exact(points_of({}), 2), (std::vector<float>{0, 0}));
}

TEST(Lloyd, StaysAtAFixedPointAndKeepsEmptyLevels) {
  const Points points = points_of({0.0f, 1.0f, 10.0f, 11.0f});
  std::vector<float> levels = {0.0f, 5.9f, 10.0f};
  kmeans_lloyd(points, 3, {Start::given, 0, 10}, levels.data());
  EXPECT_EQ(levels, (std::vector<float>{0.5f, 5.9f, 10.5f}));
}

TEST(Sums, AreThoseOfEachCode) {
  std::mt19937 engine(5);
  for (const int64_t n : {0, 1, 7, 8, 9, 1000}) {
    std::vector<uint8_t> codes(static_cast<size_t>(n));
    for (uint8_t& c : codes) c = static_cast<uint8_t>(engine() % 20);
    const std::vector<float> grad = gaussian(n, 6);
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      const std::vector<char> stored = store_as(dtype, grad);
      std::vector<double> sums(17, 0.5), expected(17, 0.5);
      std::vector<int64_t> counts(17, 1), expected_counts(17, 1);
      cluster_sums(stored.data(), dtype, codes.data(), n, 17, sums.data());
      cluster_sizes(codes.data(), n, 17, counts.data());
      for (int64_t i = 0; i < n; ++i) {
        if (codes[i] >= 17) continue;
        const void* p = stored.data() + static_cast<size_t>(i) * (dtype == Dtype::f32 ? 4 : 2);
        expected[codes[i]] += dtype == Dtype::f32    ? *static_cast<const float*>(p)
                              : dtype == Dtype::bf16 ? to_float(*static_cast<const bf16*>(p))
                                                     : to_float(*static_cast<const f16*>(p));
        ++expected_counts[codes[i]];
      }
      EXPECT_EQ(counts, expected_counts);
      for (size_t c = 0; c < 17; ++c) EXPECT_NEAR(sums[c], expected[c], 1e-9);
    }
  }
}

}  // namespace
}  // namespace phiquant
