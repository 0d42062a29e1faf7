// The byte layouts against unpackers written from the formats' descriptions.
#include "core/pack.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace phiquant {
namespace {

template <class T>
std::vector<T> random_codes(int64_t n, int lo, int hi) {
  std::mt19937 engine(5);
  std::uniform_int_distribution<int> pick(lo, hi);
  std::vector<T> codes(static_cast<size_t>(n));
  for (T& c : codes) c = static_cast<T>(pick(engine));
  return codes;
}

TEST(Pack, Int32HoldsEightCodesLowestFirst) {
  const auto codes = random_codes<int8_t>(8 * 33, -8, 7);
  std::vector<uint32_t> out(33);
  pack_int32(codes.data(), 33, out.data());
  for (size_t i = 0; i < codes.size(); ++i) {
    EXPECT_EQ(static_cast<int>(out[i / 8] >> 4 * (i % 8) & 15) - 8, codes[i]);
  }
}

}  // namespace
}  // namespace phiquant
