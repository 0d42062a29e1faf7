// The byte layouts against unpackers written from the formats' descriptions.
#include "core/pack.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace phiquant {
namespace {

constexpr int64_t kBlocks = 7;

template <class T>
std::vector<T> random_codes(int64_t n, int lo, int hi) {
  std::mt19937 engine(5);
  std::uniform_int_distribution<int> pick(lo, hi);
  std::vector<T> codes(static_cast<size_t>(n));
  for (T& c : codes) c = static_cast<T>(pick(engine));
  return codes;
}

TEST(Pack, Q4_0HoldsCodesAndScale) {
  const auto codes = random_codes<int8_t>(32 * kBlocks, -8, 7);
  const std::vector<uint16_t> d = {1, 2, 3, 4, 5, 6, 0xffff};
  std::vector<BlockQ4_0> out(kBlocks);
  pack_q4_0(codes.data(), d.data(), kBlocks, out.data());
  for (size_t b = 0; b < kBlocks; ++b) {
    EXPECT_EQ(out[b].d, d[b]);
    for (size_t j = 0; j < 16; ++j) {
      EXPECT_EQ((out[b].qs[j] & 15) - 8, codes[32 * b + j]);
      EXPECT_EQ((out[b].qs[j] >> 4) - 8, codes[32 * b + j + 16]);
    }
  }
}

TEST(Pack, Q4_1HoldsCodesScaleAndMinimum) {
  const auto codes = random_codes<uint8_t>(32 * kBlocks, 0, 15);
  const std::vector<uint16_t> d = {1, 2, 3, 4, 5, 6, 7};
  const std::vector<uint16_t> m = {9, 8, 7, 6, 5, 4, 3};
  std::vector<BlockQ4_1> out(kBlocks);
  pack_q4_1(codes.data(), d.data(), m.data(), kBlocks, out.data());
  for (size_t b = 0; b < kBlocks; ++b) {
    EXPECT_EQ(out[b].d, d[b]);
    EXPECT_EQ(out[b].m, m[b]);
    for (size_t j = 0; j < 16; ++j) {
      EXPECT_EQ(out[b].qs[j] & 15, codes[32 * b + j]);
      EXPECT_EQ(out[b].qs[j] >> 4, codes[32 * b + j + 16]);
    }
  }
}

TEST(Pack, Q8_0HoldsCodesAndScale) {
  const auto codes = random_codes<int8_t>(32 * kBlocks, -128, 127);
  const std::vector<uint16_t> d = {1, 2, 3, 4, 5, 6, 7};
  std::vector<BlockQ8_0> out(kBlocks);
  pack_q8_0(codes.data(), d.data(), kBlocks, out.data());
  for (size_t b = 0; b < kBlocks; ++b) {
    EXPECT_EQ(out[b].d, d[b]);
    for (size_t j = 0; j < 32; ++j) EXPECT_EQ(out[b].qs[j], codes[32 * b + j]);
  }
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
