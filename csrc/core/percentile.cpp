#include "core/percentile.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "core/half.h"

namespace phiquant {
namespace {

// Unsigned integers in the order of the floats (-0 before +0), and back.
uint32_t key_of(float v) {
  const auto bits = std::bit_cast<uint32_t>(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
float value_of(uint32_t key) { return std::bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

template <class T>
std::vector<uint32_t> finite_keys(const T* x, int64_t n, bool magnitude) {
  std::vector<uint32_t> keys(static_cast<size_t>(n));
  size_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = to_float(x[i]);
    keys[kept] = key_of(magnitude ? std::fabs(v) : v);
    kept += (std::bit_cast<uint32_t>(v) & 0x7f800000u) != 0x7f800000u ? 1 : 0;
  }
  keys.resize(kept);
  return keys;
}

// The values at places k and k + 1 (or k again at the end) of the sorted keys. Three rounds of 11, 11 and 10 bits:
// each counts its digit and keeps the keys that share the digit at place k. Reorders the keys.
std::array<float, 2> select(std::vector<uint32_t>& keys, size_t k) {
  uint32_t* begin = keys.data();
  uint32_t* end = begin + keys.size();
  const size_t next = std::min(k + 1, keys.size() - 1) - k;  // 0 or 1 places on
  uint32_t above = 0;                                        // smallest key known to come after those kept
  bool known = false;
  for (const int shift : {21, 10, 0}) {
    if (end - begin <= 4096) break;
    std::array<uint32_t, 2048> counts{};
    const uint32_t mask = shift == 0 ? 1023u : 2047u;
    for (const uint32_t* p = begin; p < end; ++p) ++counts[*p >> shift & mask];
    uint32_t digit = 0;
    while (k >= counts[digit]) k -= counts[digit++];
    uint32_t* kept = begin;
    for (const uint32_t* p = begin; p < end; ++p) {
      const uint32_t d = *p >> shift & mask;
      if (d > digit && (!known || *p < above)) {
        above = *p;
        known = true;
      }
      if (d == digit) *kept++ = *p;
    }
    end = kept;
  }
  std::nth_element(begin, begin + k, end);
  const uint32_t low = begin[k];
  uint32_t high = low;
  if (next == 1) {
    const uint32_t* after = std::min_element(begin + k + 1, end);
    high = after < end ? *after : above;
  }
  return {value_of(low), value_of(high)};
}

}  // namespace

float percentile(const void* x, Dtype dtype, int64_t n, double q, bool magnitude) {
  std::vector<uint32_t> keys = dtype == Dtype::f32    ? finite_keys(static_cast<const float*>(x), n, magnitude)
                               : dtype == Dtype::bf16 ? finite_keys(static_cast<const bf16*>(x), n, magnitude)
                                                      : finite_keys(static_cast<const f16*>(x), n, magnitude);
  if (keys.empty()) return std::numeric_limits<float>::quiet_NaN();
  const double place = q * static_cast<double>(keys.size() - 1);
  const double whole = std::floor(place);
  const auto [low, high] = select(keys, static_cast<size_t>(whole));
  const double part = place - whole;
  return static_cast<float>(low + part * (static_cast<double>(high) - low));
}

}  // namespace phiquant
