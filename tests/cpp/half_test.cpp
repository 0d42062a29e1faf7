// The scalar 16-bit conversions, over all 65536 values and around every rounding boundary.
#include "core/half.h"

#include <gtest/gtest.h>

#include <cmath>

namespace phiquant {
namespace {

// The value of an fp16 by its definition.
double value_of(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

TEST(Half, EveryFiniteF16DecodesToItsDefinition) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    if ((bits & 0x7c00u) == 0x7c00u) continue;
    EXPECT_EQ(to_float(f16{static_cast<uint16_t>(bits)}), value_of(static_cast<uint16_t>(bits)));
  }
}

TEST(Half, EveryF16AndBf16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const f16 h{static_cast<uint16_t>(bits)};
    const bf16 b{static_cast<uint16_t>(bits)};
    if (!std::isnan(to_float(h))) {
      EXPECT_EQ(from_float<f16>(to_float(h)).bits, h.bits);
    }
    if (!std::isnan(to_float(b))) {
      EXPECT_EQ(from_float<bf16>(to_float(b)).bits, b.bits);
    }
  }
}

TEST(Half, F16RoundsToNearestEven) {
  for (uint16_t bits = 0; bits < 0x7bff; ++bits) {
    const double low = value_of(bits);
    const double high = value_of(static_cast<uint16_t>(bits + 1));
    const auto middle = static_cast<float>((low + high) / 2);  // exact: it needs one more bit
    const uint16_t even = bits % 2 == 0 ? bits : static_cast<uint16_t>(bits + 1);
    EXPECT_EQ(from_float<f16>(middle).bits, even);
    EXPECT_EQ(from_float<f16>(std::nextafter(middle, 0.0f)).bits, bits);
    EXPECT_EQ(from_float<f16>(std::nextafter(middle, 1e9f)).bits, bits + 1);
    EXPECT_EQ(from_float<f16>(-middle).bits, even | 0x8000);
  }
}

TEST(Half, LargeValuesBecomeInfinityAndNanStaysNan) {
  EXPECT_EQ(from_float<f16>(65519.99f).bits, 0x7bff);
  EXPECT_EQ(from_float<f16>(65520.0f).bits, 0x7c00);
  EXPECT_EQ(from_float<f16>(-1e30f).bits, 0xfc00);
  EXPECT_TRUE(std::isnan(to_float(from_float<f16>(std::nanf("")))));
  EXPECT_TRUE(std::isnan(to_float(from_float<bf16>(std::nanf("")))));
  EXPECT_TRUE(std::isinf(to_float(from_float<bf16>(3.4e38f))));
}

TEST(Half, Bf16RoundsToNearestEven) {
  EXPECT_EQ(from_float<bf16>(std::bit_cast<float>(0x3f808000u)).bits, 0x3f80);
  EXPECT_EQ(from_float<bf16>(std::bit_cast<float>(0x3f818000u)).bits, 0x3f82);
  EXPECT_EQ(from_float<bf16>(std::bit_cast<float>(0x3f808001u)).bits, 0x3f81);
}

}  // namespace
}  // namespace phiquant
