// Percentiles against a sort.
#include "core/percentile.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "support.h"

namespace phiquant {
namespace {

float by_sorting(const std::vector<char>& x, Dtype dtype, size_t n, double q, bool magnitude) {
  std::vector<double> values;
  for (size_t i = 0; i < n; ++i) {
    float v = 0.0f;
    if (dtype == Dtype::f32) {
      std::memcpy(&v, &x[4 * i], 4);
    } else {
      uint16_t bits;
      std::memcpy(&bits, &x[2 * i], 2);
      v = dtype == Dtype::bf16 ? to_float(bf16{bits}) : to_float(f16{bits});
    }
    if (std::isfinite(v)) values.push_back(magnitude ? std::fabs(v) : v);
  }
  if (values.empty()) return std::nanf("");
  std::sort(values.begin(), values.end());
  const double place = q * static_cast<double>(values.size() - 1);
  const auto k = static_cast<size_t>(place);
  const double next = values[std::min(k + 1, values.size() - 1)];
  return static_cast<float>(values[k] + (place - std::floor(place)) * (next - values[k]));
}

TEST(Percentile, EqualsASort) {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    for (const int64_t n : {1, 2, 5, 100, 4096, 4097, 50000}) {
      const std::vector<char> x = store_as(dtype, awkward(n, static_cast<uint32_t>(n)));
      for (const double q : {0.0, 0.001, 0.25, 0.5, 0.99, 0.9999, 1.0}) {
        for (const bool magnitude : {false, true}) {
          const float expected = by_sorting(x, dtype, static_cast<size_t>(n), q, magnitude);
          const float found = percentile(x.data(), dtype, n, q, magnitude);
          if (std::isnan(expected)) {
            EXPECT_TRUE(std::isnan(found));
          } else {
            EXPECT_EQ(found, expected) << n << " values, q " << q;
          }
        }
      }
    }
  }
}

TEST(Percentile, TheNextValueMayLieBeyondTheDigitThatWasKept) {
  std::vector<float> x(10000, 1.0f);
  std::fill(x.begin() + 5000, x.end(), 1e6f);
  EXPECT_EQ(percentile(x.data(), Dtype::f32, 10000, 0.5, false), 500000.5f);
  EXPECT_TRUE(std::isnan(percentile(x.data(), Dtype::f32, 0, 0.5, false)));
}

}  // namespace
}  // namespace phiquant
