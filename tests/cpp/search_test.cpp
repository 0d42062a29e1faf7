// The range of least squared error: levels equal, never worse, and the optimum against a search of all scales.
#include "core/search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/affine.h"
#include "support.h"

namespace phiquant {
namespace {

RangeSpec spec_of(Rule rule, int bits, Storage storage) {
  const float top = static_cast<float>((1 << bits) - 1);
  const bool is_signed = rule == Rule::absmax || rule == Rule::signed_absmax;
  const float low = is_signed ? -std::ldexp(1.0f, bits - 1) : 0.0f;
  return {{low, low + top, rule == Rule::minimum ? Offset::minimum : Offset::zero_point}, rule, storage};
}

constexpr Rule kRules[] = {Rule::absmax, Rule::signed_absmax, Rule::zero_point, Rule::minimum};

TEST(Search, EveryLevelGivesTheSameBits) {
  for (const int64_t block : {1, 3, 8, 15, 16, 17, 32, 33, 64, 100, 256, 257, 1001}) {
    const int64_t blocks = block > 256 ? 2 : 18;
    std::vector<float> values = awkward(blocks * block, static_cast<uint32_t>(block));
    const std::vector<float> plain = gaussian(blocks * block, 7);
    std::copy(plain.begin() + block, plain.end(), values.begin() + block);  // one awkward block, the rest finite
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      const std::vector<char> x = store_as(dtype, values);
      for (const Rule rule : kRules) {
        for (const int bits : {2, 4, 8}) {
          const RangeSpec spec = spec_of(rule, bits, static_cast<Storage>(dtype));
          for (const bool exact : {false, true}) {
            const Layout layout{dtype, blocks, block};
            std::vector<float> expected(static_cast<size_t>(2 * blocks)), found(expected.size());
            search_ref.search(x.data(), layout, spec, exact, {}, expected.data(), expected.data() + blocks);
            for (const Level level : available_levels()) {
              const LevelGuard guard(level);
              search_kernels().search(x.data(), layout, spec, exact, {}, found.data(), found.data() + blocks);
              ASSERT_EQ(0, std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)))
                  << level_name(level) << " block " << block << " bits " << bits << " rule " << static_cast<int>(rule)
                  << " exact " << exact;
            }
          }
        }
      }
    }
  }
}

TEST(Search, EveryLevelGivesTheSameBitsWithWeights) {
  for (const int64_t block : {1, 8, 17, 32, 256, 257}) {
    const int64_t blocks = 18, columns = 3 * block;
    const std::vector<float> x = awkward(blocks * block, static_cast<uint32_t>(block));
    std::vector<float> weights = gaussian(columns, 5);
    for (float& weight : weights) weight *= weight;
    weights[0] = 0.0f;
    const Layout layout{Dtype::f32, blocks, block};
    for (const Rule rule : kRules) {
      const RangeSpec spec = spec_of(rule, 3, Storage::f16);
      std::vector<float> expected(static_cast<size_t>(2 * blocks)), found(expected.size());
      const Weights w{weights.data(), columns, 2 * block};
      search_ref.search(x.data(), layout, spec, false, w, expected.data(), expected.data() + blocks);
      for (const Level level : available_levels()) {
        const LevelGuard guard(level);
        search_kernels().search(x.data(), layout, spec, false, w, found.data(), found.data() + blocks);
        ASSERT_EQ(0, std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)))
            << level_name(level) << " block " << block << " rule " << static_cast<int>(rule);
      }
    }
  }
}

double squared_error(const std::vector<float>& x, Params p, Grid grid) {
  std::vector<float> y(x.size());
  affine_ref.fake_quantize(x.data(), {Dtype::f32, 1, static_cast<int64_t>(x.size())}, {&p.scale, &p.offset}, grid,
                           y.data());
  double sum = 0.0;
  for (size_t i = 0; i < x.size(); ++i) sum += std::pow(double{y[i]} - double{x[i]}, 2);
  return sum;
}

Params choose(const std::vector<float>& x, RangeSpec spec, const char* how) {
  const Layout layout{Dtype::f32, 1, static_cast<int64_t>(x.size())};
  Params p{};
  if (how[0] == 'm') affine_ref.choose_range(x.data(), layout, spec, &p.scale, &p.offset);
  if (how[0] != 'm') search_ref.search(x.data(), layout, spec, how[0] == 'e', {}, &p.scale, &p.offset);
  return p;
}

// No tolerance but fp64's own: a range replaces another only if it is better by more than fp32's rounding.
TEST(Search, ExactIsNeverAboveGridIsNeverAboveMinMax) {
  for (const Rule rule : kRules) {
    for (const int bits : {2, 3, 4, 6, 8}) {
      double plain = 0.0;
      double searched = 0.0;
      for (const Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::e8m0, Storage::e4m3}) {
        if (storage == Storage::e8m0 && rule != Rule::absmax) continue;  // a power of two is above 0
        for (uint32_t seed = 0; seed < 60; ++seed) {
          const std::vector<float> x = gaussian(seed % 2 ? 32 : 300, seed);
          const RangeSpec spec = spec_of(rule, bits, storage);
          const double a = squared_error(x, choose(x, spec, "minmax"), spec.grid);
          const double b = squared_error(x, choose(x, spec, "grid"), spec.grid);
          const double c = squared_error(x, choose(x, spec, "exact"), spec.grid);
          ASSERT_LE(b, a);
          ASSERT_LE(c, b);
          plain += a;
          searched += b;
        }
      }
      EXPECT_LT(searched, (bits <= 4 ? 0.98 : 1.0) * plain) << static_cast<int>(rule) << " " << bits;
    }
  }
}

// Brute force: after every breakpoint |x| / (k + 1/2), taken from the largest down, the codes are found anew and the
// scale fitted to them in fp64; the least error of all, for a scale of sign `sign`.
double least_error(const std::vector<float>& x, double low, double high, double sign) {
  std::vector<double> breaks;
  const double most = std::max(-low, high);
  for (const float v : x) {
    for (double k = 0.5; k < most; k += 1.0) breaks.push_back(std::abs(double{v}) / k);
  }
  std::sort(breaks.rbegin(), breaks.rend());
  double xx = 0.0;
  for (const float v : x) xx += double{v} * v;
  double least = xx;
  for (size_t i = 0; i + 1 < breaks.size(); ++i) {
    const double s = 0.5 * (breaks[i] + breaks[i + 1]) * sign;
    if (s == 0.0) break;
    double qx = 0.0;
    double qq = 0.0;
    for (const float v : x) {
      const double q = std::min(std::max(std::nearbyint(v / s), low), high);
      qx += q * v;
      qq += q * q;
    }
    if (qq > 0.0) least = std::min(least, xx - qx * qx / qq);
  }
  return least;
}

TEST(Search, ExactFindsTheOptimumOfAllScales) {
  for (const Rule rule : {Rule::absmax, Rule::signed_absmax, Rule::zero_point}) {
    for (const int bits : {2, 3, 4, 5, 8}) {
      if (rule == Rule::zero_point && bits > 4) continue;
      for (uint32_t seed = 0; seed < 12; ++seed) {
        const std::vector<float> x = gaussian(seed == 0 ? 100 : 24 + 4 * seed, seed);
        const RangeSpec spec = spec_of(rule, bits, Storage::f32);
        double least = 1e30;
        if (rule == Rule::zero_point) {
          for (float z = spec.grid.qmin; z <= spec.grid.qmax; z += 1.0f) {
            least = std::min(least, least_error(x, spec.grid.qmin - z, spec.grid.qmax - z, 1.0));
          }
        } else {
          least = least_error(x, spec.grid.qmin, spec.grid.qmax, 1.0);
          if (rule == Rule::signed_absmax) {
            least = std::min(least, least_error(x, spec.grid.qmin, spec.grid.qmax, -1.0));
          }
        }
        const double found = squared_error(x, choose(x, spec, "exact"), spec.grid);
        EXPECT_LE(found, least * (1.0 + 1e-4)) << static_cast<int>(rule) << " " << bits << " " << seed;
        EXPECT_GE(found, least * (1.0 - 1e-5)) << "x.x - (q.x)^2 / (q.q) cancels";
      }
    }
  }
}

TEST(Search, ZerosTinyHugeAndNotFinite) {
  for (const Rule rule : kRules) {
    const RangeSpec spec = spec_of(rule, 4, Storage::f16);
    for (const char* how : {"grid", "exact"}) {
      EXPECT_EQ(choose(std::vector<float>(32, 0.0f), spec, how).scale, 0.0f);
      EXPECT_EQ(choose({1e-45f, 0.0f}, spec, how).scale, 0.0f);
      EXPECT_TRUE(std::isfinite(choose({3e38f, -1e38f, 1.0f}, spec, how).scale));
      for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
        EXPECT_TRUE(std::isnan(choose({1.0f, bad, 2.0f}, spec, how).scale));
        std::vector<float> row = gaussian(400, 3);
        row[333] = bad;
        EXPECT_TRUE(std::isnan(choose(row, spec, how).scale));
      }
    }
  }
}

}  // namespace
}  // namespace phiquant
