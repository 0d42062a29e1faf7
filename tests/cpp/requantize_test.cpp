// The fixed point of requantize.h against its definition in wider integers and long doubles.
#include "core/requantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "core/gemm.h"
#include "support.h"

namespace phiquant {
namespace {

constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
constexpr int32_t kMin = std::numeric_limits<int32_t>::min();

std::vector<int32_t> awkward_integers() {
  std::vector<int32_t> values = {0, 1, -1, 2, -2, 3, -3, kMax, kMin, kMax - 1, kMin + 1, 1 << 30, -(1 << 30)};
  for (int n = 1; n < 31; ++n) {
    for (const int32_t near : {-1, 0, 1}) {
      values.push_back((1 << n) + near);
      values.push_back(-(1 << n) + near);
    }
  }
  std::mt19937 engine(3);
  for (int i = 0; i < 500; ++i) values.push_back(static_cast<int32_t>(engine()));
  return values;
}

int64_t floor_divide(__int128 a, __int128 b) { return static_cast<int64_t>(a >= 0 ? a / b : -((-a + b - 1) / b)); }

TEST(Requantize, DoublingHighIsRoundedHalfUp) {
  const auto values = awkward_integers();
  for (const int32_t a : values) {
    for (const int32_t b : values) {
      const int64_t exact = floor_divide(static_cast<__int128>(a) * b * 2 + (int64_t{1} << 31), int64_t{1} << 32);
      EXPECT_EQ(doubling_high(a, b), a == kMin && b == kMin ? kMax : exact) << a << " " << b;
    }
  }
}

TEST(Requantize, RoundingShiftRoundsHalvesAwayFromZero) {
  for (const int32_t v : awkward_integers()) {
    for (int n = 0; n <= 31; ++n) {
      const long double exact = std::round(static_cast<long double>(v) / std::ldexp(1.0L, n));  // halves away from zero
      EXPECT_EQ(rounding_shift(v, n), static_cast<int64_t>(exact)) << v << " " << n;
    }
  }
}

TEST(Requantize, MultiplierIsWithinHalfAUnitOfTheRealOne) {
  std::mt19937 engine(4);
  std::uniform_real_distribution<double> log2(-31.9, 29.9);
  for (int i = 0; i < 2000; ++i) {
    const double real = std::exp2(log2(engine));
    const Multiplier m = quantize_multiplier(real);
    if (m.multiplier == 0) {
      EXPECT_LT(real, std::ldexp(1.0, -31));
      continue;
    }
    EXPECT_GE(m.multiplier, 1 << 30);
    EXPECT_LE(std::abs(std::ldexp(m.multiplier, -31 - m.shift) - real), std::ldexp(0.5, -31 - m.shift));
  }
}

TEST(Requantize, MultiplierAtTheEnds) {
  const auto equal = [](Multiplier m, int32_t multiplier, int32_t shift) {
    return m.multiplier == multiplier && m.shift == shift;
  };
  EXPECT_TRUE(equal(quantize_multiplier(0.0), 0, 0));
  EXPECT_TRUE(equal(quantize_multiplier(1.0), 1 << 30, -1));
  EXPECT_TRUE(equal(quantize_multiplier(0.5), 1 << 30, 0));
  EXPECT_TRUE(equal(quantize_multiplier(1.0 - 1e-16), 1 << 30, -1)) << "the fraction rounds up to 1";
  EXPECT_TRUE(equal(quantize_multiplier(std::ldexp(1.0, -32)), 1 << 30, 31));
  EXPECT_TRUE(equal(quantize_multiplier(std::ldexp(1.0, -33)), 0, 0));
  EXPECT_TRUE(equal(quantize_multiplier(1e300), kMax, -30));
}

TEST(Requantize, EveryLevelEqualsTheDefinition) {
  const auto values = awkward_integers();
  const auto rows = static_cast<int64_t>(values.size());
  constexpr int64_t kN = 37;
  std::vector<int32_t> sums, multiplier, shift;
  for (const int32_t v : values) sums.insert(sums.end(), kN, v);
  std::mt19937 engine(5);
  for (int64_t n = 0; n < kN; ++n) {
    multiplier.push_back(static_cast<int32_t>((1u << 30) + engine() % (1u << 30)));
    shift.push_back(static_cast<int32_t>(n) - 5);  // left shifts by 5 to right shifts by 31
  }
  multiplier[3] = 0;
  multiplier[4] = kMax;
  shift[5] = -30;
  for (const auto& [zero, lo, hi] : {std::tuple{0, -128, 127}, {3, 0, 255}, {-100, -128, 127}, {255, 0, 255}}) {
    std::vector<uint8_t> expected;
    for (const int32_t v : values) {
      for (size_t n = 0; n < kN; ++n) {
        const int64_t code = int64_t{multiply(v, {multiplier[n], shift[n]})} + zero;
        expected.push_back(static_cast<uint8_t>(std::clamp<int64_t>(code, lo, hi)));
      }
    }
    for (const Level level : available_levels()) {
      const LevelGuard guard(level);
      std::vector<uint8_t> codes(expected.size());
      gemm_kernels().requantize(sums.data(), rows, kN, {multiplier.data(), shift.data(), zero, lo, hi}, codes.data());
      EXPECT_EQ(codes, expected) << level_name(level);
    }
  }
}

TEST(Requantize, WithinOneOfRoundingTheExactProduct) {
  std::mt19937 engine(6);
  std::uniform_real_distribution<double> log2(-20.0, 8.0);
  int64_t differ = 0;
  constexpr int kTries = 200000;
  for (int i = 0; i < kTries; ++i) {
    const double real = std::exp2(log2(engine));
    const auto v = static_cast<int32_t>(static_cast<double>(static_cast<int32_t>(engine())) / 16);
    const double product = v * real;
    if (std::abs(product) > 1e6) continue;
    const auto exact = static_cast<int64_t>(std::nearbyint(product));
    const int64_t off = std::abs(multiply(v, quantize_multiplier(real)) - exact);
    EXPECT_LE(off, 1);
    differ += off;
  }
  EXPECT_LT(differ, kTries / 100);
}

}  // namespace
}  // namespace phiquant
