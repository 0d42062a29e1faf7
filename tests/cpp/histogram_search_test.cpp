// The searches in histograms against their definitions, written out bin by bin.
#include "core/histogram_search.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace phiquant {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// KL(P || Q) of the TensorRT form, from its sentence.
double tensorrt_by_definition(const std::vector<double>& counts, int64_t i, int64_t levels) {
  std::vector<double> p(counts.begin(), counts.begin() + i);
  for (size_t j = static_cast<size_t>(i); j < counts.size(); ++j) p.back() += counts[j];
  std::vector<double> q(p.size());
  for (int64_t l = 0; l < levels; ++l) {
    double sum = 0.0;
    double full = 0.0;
    for (int64_t j = i * l / levels; j < i * (l + 1) / levels; ++j) {
      sum += counts[static_cast<size_t>(j)];
      full += p[static_cast<size_t>(j)] > 0.0 ? 1.0 : 0.0;
    }
    for (int64_t j = i * l / levels; j < i * (l + 1) / levels; ++j) {
      if (p[static_cast<size_t>(j)] > 0.0) q[static_cast<size_t>(j)] = sum / full;
    }
  }
  double p_sum = 0.0;
  double q_sum = 0.0;
  for (size_t j = 0; j < p.size(); ++j) {
    p_sum += p[j];
    q_sum += q[j];
  }
  double kl = 0.0;
  for (size_t j = 0; j < p.size(); ++j) {
    if (p[j] > 0.0) kl += p[j] / p_sum * std::log(p[j] / p_sum / (q[j] / q_sum));
  }
  return std::isnan(kl) ? kInf : kl;
}

std::vector<double> half_normal(size_t bins, double samples, uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<double> counts(bins);
  for (size_t i = 0; i < bins; ++i) {
    const double x = 4.5 * static_cast<double>(i) / static_cast<double>(bins);
    counts[i] = std::poisson_distribution<int>(samples / static_cast<double>(bins) * 4 * std::exp(-x * x / 2))(engine);
  }
  counts.back() = 1.0;
  return counts;
}

TEST(KlSearch, TensorrtFormEqualsItsDefinition) {
  for (const double samples : {300.0, 5000.0, 1e6}) {
    for (const int64_t levels : {1, 8, 128}) {
      const std::vector<double> counts = half_normal(512, samples, static_cast<uint32_t>(levels));
      const KlSearch search(counts.data(), 512, levels, KlForm::tensorrt);
      for (int64_t i = levels; i <= 512; ++i) {
        const double expected = tensorrt_by_definition(counts, i, levels);
        if (std::isinf(expected)) {
          EXPECT_EQ(search.divergence(i), expected) << i;
        } else {
          EXPECT_NEAR(search.divergence(i), expected, 1e-12 * (1 + expected)) << i;
        }
      }
      EXPECT_EQ(search.divergence(levels - 1), kInf);
      EXPECT_EQ(search.divergence(513), kInf);
    }
  }
}

TEST(KlSearch, EmptyAndShortHistogramsHaveNoCandidate) {
  for (const KlForm form : {KlForm::tensorrt, KlForm::notebook}) {
    for (const int64_t bins : {0, 1, 2, 300}) {
      const std::vector<double> zeros(300);
      const KlSearch search(zeros.data(), bins, 2, form);
      for (int64_t i = 0; i <= bins; ++i) EXPECT_EQ(search.divergence(i), kInf);
    }
    const std::vector<double> few(100, 3.0);
    const KlSearch search(few.data(), 100, 128, form);
    for (int64_t i = 0; i <= 100; ++i) EXPECT_EQ(search.divergence(i), kInf);
  }
}

TEST(KlSearch, ARunOfEqualCountsIsKeptWhole) {
  // Q equals P when nothing is cut and neighbours are alike: divergence 0, and less is worse
  const std::vector<double> flat(256, 7.0);
  const KlSearch search(flat.data(), 256, 128, KlForm::tensorrt);
  EXPECT_NEAR(search.divergence(256), 0.0, 1e-14);
  EXPECT_GT(search.divergence(255), 1e-3);
}

TEST(HistogramMse, OutliersAreCutAndEmptyEndsSkipped) {
  std::vector<float> counts(2048);
  for (size_t i = 100; i < 300; ++i) counts[i] = 1000.0f;
  counts[2000] = 1.0f;  // one value far out: 5e-6 of them
  const BinRange range = histogram_mse(counts.data(), 2048, 0.5f, 16);
  EXPECT_EQ(range.first, 100);
  EXPECT_LT(range.end, 2001);
  const std::vector<float> none(16);
  EXPECT_EQ(histogram_mse(none.data(), 16, 1.0f, 16).end, 16);
  const std::vector<float> one = {0.0f, 5.0f, 0.0f};
  EXPECT_EQ(histogram_mse(one.data(), 3, 1.0f, 16).first, 1);
  EXPECT_EQ(histogram_mse(one.data(), 3, 1.0f, 16).end, 2);
}

}  // namespace
}  // namespace phiquant
