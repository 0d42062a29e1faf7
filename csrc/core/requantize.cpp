#include "core/requantize.h"

#include <cmath>
#include <limits>

namespace phiquant {

constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
constexpr int32_t kMin = std::numeric_limits<int32_t>::min();

Multiplier quantize_multiplier(double real) {
  int exponent = 0;
  const double fraction = std::frexp(real, &exponent);  // real = fraction * 2^exponent, fraction in [0.5, 1) or 0
  auto q = static_cast<int64_t>(std::round(fraction * 2147483648.0));
  if (q == int64_t{1} << 31) {  // the fraction was rounded up to 1
    q /= 2;
    ++exponent;
  }
  if (q == 0 || exponent < -31) return {0, 0};
  if (exponent > 30) return {kMax, -30};
  return {static_cast<int32_t>(q), -exponent};
}

int32_t doubling_high(int32_t a, int32_t b) {
  if (a == kMin && b == kMin) return kMax;
  const int64_t product = static_cast<int64_t>(a) * b;
  const int64_t nudge = product >= 0 ? int64_t{1} << 30 : 1 - (int64_t{1} << 30);
  return static_cast<int32_t>((product + nudge) / (int64_t{1} << 31));
}

int32_t rounding_shift(int32_t v, int32_t n) {
  const auto mask = static_cast<int32_t>((int64_t{1} << n) - 1);
  const int32_t remainder = v & mask;
  const int32_t threshold = (mask >> 1) + (v < 0 ? 1 : 0);
  return (v >> n) + (remainder > threshold ? 1 : 0);
}

int32_t multiply(int32_t v, Multiplier m) {
  if (m.shift >= 0) return rounding_shift(doubling_high(v, m.multiplier), m.shift);
  const int64_t shifted = static_cast<int64_t>(v) * (int64_t{1} << -m.shift);
  const int64_t saturated = shifted > kMax ? kMax : shifted < kMin ? kMin : shifted;
  return doubling_high(static_cast<int32_t>(saturated), m.multiplier);
}

}  // namespace phiquant
