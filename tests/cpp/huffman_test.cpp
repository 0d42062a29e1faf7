// The coder against a decoder written bit by bit from the format's description, and against damage.
#include "core/huffman.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "huffman_slow.h"

namespace phiquant {
namespace {

Bytes encode(const Bytes& symbols) {
  HuffmanWriter writer(static_cast<int64_t>(symbols.size()));
  for (int64_t i = 0; i < writer.chunks(); ++i) writer.count_chunk(symbols.data(), i);
  Bytes out(writer.plan());
  writer.write_header(out.data());
  for (int64_t i = 0; i < writer.chunks(); ++i) writer.encode_chunk(symbols.data(), i, out.data());
  return out;
}

// The symbols, or nothing if the data is refused. The data lies in a buffer of its exact size, so that the
// sanitizers see every byte read beyond it.
std::unique_ptr<Bytes> decode(const Bytes& data) {
  const std::unique_ptr<uint8_t[]> exact(new uint8_t[data.size()]);
  std::copy(data.begin(), data.end(), exact.get());
  try {
    const HuffmanReader reader(exact.get(), data.size());
    auto symbols = std::make_unique<Bytes>(static_cast<size_t>(reader.count()));
    for (int64_t i = 0; i < reader.chunks(); ++i) {
      if (!reader.decode_chunk(i, symbols->data())) return nullptr;
    }
    return symbols;
  } catch (const std::invalid_argument&) {
    return nullptr;
  }
}

// n symbols of an alphabet, the more skewed the larger `skew`.
Bytes random_symbols(size_t n, int alphabet, double skew, uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<double> weights;
  for (int i = 0; i < alphabet; ++i) weights.push_back(std::exp(-skew * i));
  std::discrete_distribution<int> pick(weights.begin(), weights.end());
  Bytes symbols(n);
  for (uint8_t& s : symbols) s = static_cast<uint8_t>(pick(engine));
  return symbols;
}

TEST(Huffman, RoundTripAndAgreesWithTheSlowDecoder) {
  const std::vector<size_t> sizes = {0, 1, 2, 3, 31, 32, 33, 1000, 4095, 4096, 4097, 50'001, 131'072, 131'073, 300'007};
  for (const size_t n : sizes) {
    for (const auto& [alphabet, skew] : {std::pair{1, 0.0}, {2, 3.0}, {16, 0.4}, {256, 0.0}, {256, 0.05}, {40, 1.0}}) {
      const Bytes symbols = random_symbols(n, alphabet, skew, static_cast<uint32_t>(n));
      const Bytes data = encode(symbols);
      const auto decoded = decode(data);
      ASSERT_TRUE(decoded) << n << " " << alphabet;
      ASSERT_EQ(*decoded, symbols) << n << " " << alphabet;
      ASSERT_EQ(decode_slowly(data), symbols) << n << " " << alphabet;
    }
  }
}

TEST(Huffman, SizeIsTheSumOfTheLengths) {
  const Bytes symbols = random_symbols(100'000, 16, 0.4, 3);
  PerSymbol<uint64_t> counts{};
  for (const uint8_t s : symbols) ++counts[s];
  const auto lengths = huffman_lengths(counts);
  uint64_t bits = 0;
  for (size_t s = 0; s < 256; ++s) bits += counts[s] * lengths[s];
  const size_t size = encode(symbols).size();
  EXPECT_GE(size, bits / 8 + 12 + 8 + 16);
  EXPECT_LE(size, bits / 8 + 12 + 8 + 16 + 4);  // each of four streams ends with a whole byte
}

// The least sum of count * length over all lengths up to the limit with Kraft sum 1, by trying them all.
uint64_t least_bits(const std::vector<uint64_t>& sorted, size_t at, int from, int limit, int64_t left) {
  const auto share = [&](int length) { return int64_t{1} << (limit - length); };
  if (at == sorted.size()) return left == 0 ? 0 : UINT64_MAX / 2;
  uint64_t best = UINT64_MAX / 2;
  for (int length = from; length <= limit; ++length) {  // counts fall, so lengths rise
    if (share(length) > left || static_cast<int64_t>(sorted.size() - at) * share(length) < left) continue;
    best = std::min(best, sorted[at] * static_cast<uint64_t>(length) +
                              least_bits(sorted, at + 1, length, limit, left - share(length)));
  }
  return best;
}

TEST(Huffman, LengthsAreTheBestUnderTheLimit) {
  std::mt19937 engine(1);
  for (int trial = 0; trial < 40; ++trial) {
    const size_t n = 2 + engine() % 14;
    PerSymbol<uint64_t> counts{};
    std::vector<uint64_t> sorted;
    for (size_t s = 0; s < n; ++s) {
      // Fibonacci-like growth asks for codes of up to 15 bits: the limit of 12 binds.
      counts[s] = trial % 2 ? 1 + engine() % 100 : static_cast<uint64_t>(std::pow(1.7, static_cast<double>(s))) + 1;
      sorted.push_back(counts[s]);
    }
    std::sort(sorted.rbegin(), sorted.rend());
    const auto lengths = huffman_lengths(counts);
    uint64_t bits = 0;
    double kraft = 0;
    for (size_t s = 0; s < 256; ++s) {
      bits += counts[s] * lengths[s];
      EXPECT_EQ(lengths[s] == 0, counts[s] == 0);
      EXPECT_LE(lengths[s], kHuffmanBits);
      if (lengths[s]) kraft += std::ldexp(1.0, -lengths[s]);
    }
    EXPECT_EQ(kraft, 1.0);
    EXPECT_EQ(bits, least_bits(sorted, 0, 1, kHuffmanBits, int64_t{1} << kHuffmanBits));
  }
}

TEST(Huffman, TheLimitBindsAndDataStillComesBack) {
  Bytes symbols(1 << 16, 0);
  for (size_t s = 1; s < 256; ++s) symbols[s * 200] = static_cast<uint8_t>(s);
  const auto decoded = decode(encode(symbols));
  ASSERT_TRUE(decoded);
  EXPECT_EQ(*decoded, symbols);
}

TEST(Huffman, EveryDamagedByteIsRefusedOrGivesAsManySymbols) {
  for (const size_t n : {size_t{200}, size_t{5000}}) {
    const Bytes data = encode(random_symbols(n, 16, 0.4, 9));
    std::mt19937 engine(2);
    size_t refused = 0;
    for (size_t at = 0; at < data.size(); ++at) {
      for (const uint8_t flip : {uint8_t{1}, uint8_t{0x80}, static_cast<uint8_t>(engine() | 1)}) {
        Bytes damaged = data;
        damaged[at] ^= flip;
        const auto decoded = decode(damaged);
        const auto expected = decode_slowly(damaged);
        ASSERT_EQ(static_cast<bool>(decoded), expected.has_value()) << at;
        if (decoded) {
          ASSERT_EQ(*decoded, *expected) << at;
        }
        refused += !decoded;
        if (decoded && at >= 8) {
          EXPECT_EQ(decoded->size(), n);
        }
      }
    }
    EXPECT_GT(refused, 3u * 8u);  // at least all that touches the count
  }
}

TEST(Huffman, EveryTruncationAndExtensionIsRefused) {
  const Bytes data = encode(random_symbols(5000, 16, 0.4, 9));
  for (size_t size = 0; size < data.size(); ++size) {
    EXPECT_FALSE(decode(Bytes(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(size)))) << size;
  }
  Bytes longer = data;
  longer.push_back(0);
  EXPECT_FALSE(decode(longer));
}

Bytes tiny() { return encode({0, 1, 2, 3, 0, 1, 2, 3}); }  // lengths 2 2 2 2 in bytes 12 and 13

TEST(Huffman, HostileHeadersAreRefused) {
  ASSERT_EQ(tiny().size(), 12u + 2u + 4u + 2u);
  const auto with = [](size_t at, Bytes bytes) {
    Bytes data = tiny();
    std::copy(bytes.begin(), bytes.end(), data.begin() + static_cast<std::ptrdiff_t>(at));
    return data;
  };
  EXPECT_TRUE(decode(tiny()));
  EXPECT_FALSE(decode(with(0, Bytes(8, 0xff)))) << "a count of 2^64 - 1";
  EXPECT_FALSE(decode(with(7, {0x7f}))) << "a giant count";
  EXPECT_FALSE(decode(with(0, {0}))) << "no symbols, but streams";
  EXPECT_FALSE(decode(with(10, {2}))) << "two streams";
  EXPECT_FALSE(decode(with(8, {4, 3}))) << "first after last";
  EXPECT_FALSE(decode(with(12, {0x11}))) << "lengths that give out more than all codes";
  EXPECT_FALSE(decode(with(12, {0x32}))) << "lengths that leave codes over";
  EXPECT_FALSE(decode(with(12, {0xdd, 0xdd}))) << "a length of 13";
  EXPECT_FALSE(decode(with(14, {0xff, 0xff, 0xff, 0xff}))) << "a stream longer than the data";
  EXPECT_FALSE(decode(with(14, {1}))) << "a stream too short for its symbols";
}

}  // namespace
}  // namespace phiquant
