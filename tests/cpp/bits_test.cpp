// Packed codes against a bit-by-bit packer, at every CPU level; all lengths around the borders of words and runs.
#include "core/bits.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "support.h"

namespace phiquant {
namespace {

std::vector<int8_t> random_codes(int64_t n, int low, int values) {
  std::mt19937 engine(static_cast<uint32_t>(n));
  std::vector<int8_t> codes(static_cast<size_t>(n));
  for (int8_t& c : codes) c = static_cast<int8_t>(low + static_cast<int>(engine() % static_cast<uint32_t>(values)));
  return codes;
}

// One bit after the other, by the words of bits.h.
std::vector<uint8_t> naive_stream(const std::vector<int8_t>& codes, int bits, int low) {
  const auto n = static_cast<int64_t>(codes.size());
  std::vector<uint8_t> packed(static_cast<size_t>((n * bits + 7) / 8));
  for (int64_t i = 0; i < n; ++i) {
    const unsigned stored = static_cast<uint8_t>(codes[static_cast<size_t>(i)] - low);
    for (int b = 0; b < bits; ++b) {
      const int64_t at = i * bits + b;
      packed[static_cast<size_t>(at / 8)] |= static_cast<uint8_t>((stored >> b & 1u) << at % 8);
    }
  }
  return packed;
}

constexpr int64_t kLengths[] = {0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 63, 64, 65, 71, 72, 100, 127, 128, 129, 1000, 4099};

TEST(Bits, StreamEqualsBitByBitAndComesBack) {
  for (const Level level : available_levels()) {
    const LevelGuard guard(level);
    for (int bits = 1; bits <= 8; ++bits) {
      for (const int low : {0, -(1 << (bits - 1)), -1}) {
        for (const int64_t n : kLengths) {
          const std::vector<int8_t> codes = random_codes(n, low, 1 << bits);
          const std::vector<uint8_t> expected = naive_stream(codes, bits, low);
          ASSERT_EQ(packed_bytes(n, bits), static_cast<int64_t>(expected.size()));
          std::vector<uint8_t> packed(expected.size(), 0xaa);
          ASSERT_TRUE(bit_kernels().pack_bits(codes.data(), n, bits, low, packed.data()));
          ASSERT_EQ(packed, expected) << level_name(level) << " bits " << bits << " low " << low << " n " << n;
          std::vector<int8_t> back(codes.size(), 99);
          bit_kernels().unpack_bits(packed.data(), n, bits, low, back.data());
          ASSERT_EQ(back, codes) << level_name(level) << " bits " << bits << " low " << low << " n " << n;
        }
      }
    }
  }
}

TEST(Bits, TritsEqualPowersOfThreeAndComeBack) {
  for (const Level level : available_levels()) {
    const LevelGuard guard(level);
    for (const int low : {0, -1}) {
      for (const int64_t n : kLengths) {
        const std::vector<int8_t> codes = random_codes(n, low, 3);
        std::vector<uint8_t> expected(static_cast<size_t>(packed_trit_bytes(n)));
        int power = 1;
        for (int64_t i = 0; i < n; ++i, power = i % 5 ? power * 3 : 1) {
          expected[static_cast<size_t>(i / 5)] += static_cast<uint8_t>(power * (codes[static_cast<size_t>(i)] - low));
        }
        std::vector<uint8_t> packed(expected.size(), 0xaa);
        ASSERT_TRUE(bit_kernels().pack_trits(codes.data(), n, low, packed.data()));
        ASSERT_EQ(packed, expected) << level_name(level) << " low " << low << " n " << n;
        std::vector<int8_t> back(codes.size(), 99);
        ASSERT_TRUE(bit_kernels().unpack_trits(packed.data(), n, low, back.data()));
        ASSERT_EQ(back, codes);
      }
    }
  }
}

TEST(Bits, CodesThatDoNotFitAreReported) {
  for (const Level level : available_levels()) {
    const LevelGuard guard(level);
    for (const int64_t n : {1, 8, 64, 200}) {
      for (const int64_t at : {int64_t{0}, n / 2, n - 1}) {
        std::vector<uint8_t> packed(static_cast<size_t>(n));
        for (int bits = 1; bits <= 7; ++bits) {
          std::vector<int8_t> codes(static_cast<size_t>(n), -1);
          codes[static_cast<size_t>(at)] = static_cast<int8_t>((1 << bits) - 1);
          EXPECT_FALSE(bit_kernels().pack_bits(codes.data(), n, bits, -1, packed.data()));
          codes[static_cast<size_t>(at)] = -2;
          EXPECT_FALSE(bit_kernels().pack_bits(codes.data(), n, bits, -1, packed.data()));
        }
        for (int wrong = -128; wrong <= 127; ++wrong) {
          std::vector<int8_t> codes(static_cast<size_t>(n), 1);
          codes[static_cast<size_t>(at)] = static_cast<int8_t>(wrong);
          EXPECT_EQ(bit_kernels().pack_trits(codes.data(), n, 0, packed.data()), wrong >= 0 && wrong <= 2);
        }
      }
    }
    for (int byte = 0; byte < 256; ++byte) {
      const auto packed = static_cast<uint8_t>(byte);
      int8_t codes[5];
      EXPECT_EQ(bit_kernels().unpack_trits(&packed, 5, 0, codes), byte < 243);
    }
  }
}

}  // namespace
}  // namespace phiquant
