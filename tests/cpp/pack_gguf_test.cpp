// GGUF's block types against decoders of one value at a time, written from the layouts of ggml.
#include "core/pack_gguf.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <vector>

namespace phiquant {
namespace {

using Bytes = std::vector<uint8_t>;
constexpr int kBlocks = 5;

// One value of a block: its code, and the codes of its sub-scale and sub-minimum (0 where there are none).
struct Value {
  int code = 0;
  int scale = 0;
  int minimum = 0;
};
using Read = std::function<Value(const uint8_t*, int)>;

int nibble(const uint8_t* bytes, int i, int half) { return i < half ? bytes[i] & 15 : bytes[i - half] >> 4; }
int crumb(const uint8_t* bytes, int i) { return bytes[i / 128 * 32 + i % 32] >> 2 * (i % 128 / 32) & 3; }
int plane(const uint8_t* bytes, int i) { return bytes[i % 32] >> i / 32 & 1; }
int chunk(const uint8_t* bytes, int i) { return nibble(bytes + i / 64 * 32, i % 64, 32); }
int fifth(const uint8_t* bytes, int j) { return bytes[j / 8] >> j % 8 & 1; }
int as_signed(int byte) { return byte > 127 ? byte - 256 : byte; }

// The eight scales or minimums of six bits, as ggml's get_scale_min_k4 reads them.
int six(const uint8_t* q, int j, bool minimum) {
  if (j < 4) return q[j + (minimum ? 4 : 0)] & 63;
  return minimum ? (q[j + 4] >> 4) | (q[j] >> 6 << 4) : (q[j + 4] & 15) | (q[j - 4] >> 6 << 4);
}

int three_bit_scale(const uint8_t* q, int j) {
  return ((j < 8 ? q[j] & 15 : q[j - 8] >> 4) | (q[8 + j % 4] >> 2 * (j / 4) & 3) << 4) - 32;
}

// Digit n of a byte of trits: multiply by 3^n in eight bits, then what a further 3 carries out.
int trit(uint8_t byte, int n) {
  for (; n > 0; --n) byte = static_cast<uint8_t>(byte * 3);
  return (byte * 3 >> 8) - 1;
}

int tq1(const uint8_t* b, int i) {
  if (i < 160) return trit(b[i % 32], i / 32);
  if (i < 240) return trit(b[32 + (i - 160) % 16], (i - 160) / 16);
  return trit(b[48 + (i - 240) % 4], (i - 240) / 4);
}

struct Case {
  const char* name;
  int code_min, code_max, scale_min, scale_max, minimum_max;
  int d_at, m_at;  // where d and m lie in a block; -1: nowhere
  Read read;
};

const Case kCases[] = {
    {"Q4_0", -8, 7, 0, 0, 0, 0, -1, [](auto* b, int i) { return Value{nibble(b + 2, i, 16) - 8}; }},
    {"Q4_1", 0, 15, 0, 0, 0, 0, 2, [](auto* b, int i) { return Value{nibble(b + 4, i, 16)}; }},
    {"Q5_0", -16, 15, 0, 0, 0, 0, -1,
     [](auto* b, int i) { return Value{nibble(b + 6, i, 16) + 16 * fifth(b + 2, i) - 16}; }},
    {"Q5_1", 0, 31, 0, 0, 0, 0, 2, [](auto* b, int i) { return Value{nibble(b + 8, i, 16) + 16 * fifth(b + 4, i)}; }},
    {"Q8_0", -128, 127, 0, 0, 0, 0, -1, [](auto* b, int i) { return Value{as_signed(b[2 + i])}; }},
    {"IQ4_NL", 0, 15, 0, 0, 0, 0, -1, [](auto* b, int i) { return Value{nibble(b + 2, i, 16)}; }},
    {"MXFP4", 0, 15, 0, 255, 0, -1, -1, [](auto* b, int i) { return Value{nibble(b + 1, i, 16), b[0]}; }},
    {"NVFP4", 0, 15, 0, 255, 0, -1, -1,
     [](auto* b, int i) { return Value{nibble(b + 4 + i / 16 * 8, i % 16, 8), b[i / 16]}; }},
    {"Q2_K", 0, 3, 0, 15, 15, 80, 82,
     [](auto* b, int i) { return Value{crumb(b + 16, i), b[i / 16] & 15, b[i / 16] >> 4}; }},
    {"Q3_K", -4, 3, -32, 31, 0, 108, -1,
     [](auto* b, int i) { return Value{crumb(b + 32, i) + 4 * plane(b, i) - 4, three_bit_scale(b + 96, i / 16)}; }},
    {"Q4_K", 0, 15, 0, 63, 63, 0, 2,
     [](auto* b, int i) { return Value{chunk(b + 16, i), six(b + 4, i / 32, false), six(b + 4, i / 32, true)}; }},
    {"Q5_K", 0, 31, 0, 63, 63, 0, 2,
     [](auto* b, int i) {
       const int code = chunk(b + 48, i) + 16 * plane(b + 16, i);
       return Value{code, six(b + 4, i / 32, false), six(b + 4, i / 32, true)};
     }},
    {"Q6_K", -32, 31, -128, 127, 0, 208, -1,
     [](auto* b, int i) {
       const int low = nibble(b + i / 128 * 64, i % 128, 64);
       return Value{low + 16 * crumb(b + 128, i) - 32, as_signed(b[192 + i / 16])};
     }},
    {"IQ4_XS", 0, 15, -32, 31, 0, 0, -1,
     [](auto* b, int i) {
       const int j = i / 32, high = b[2] | b[3] << 8;
       const int scale = (b[4 + j / 2] >> 4 * (j % 2) & 15) + 16 * (high >> 2 * j & 3) - 32;
       return Value{nibble(b + 8 + 16 * j, i % 32, 16), scale};
     }},
    {"TQ1_0", -1, 1, 0, 0, 0, 52, -1, [](auto* b, int i) { return Value{tq1(b, i)}; }},
    {"TQ2_0", -1, 1, 0, 0, 0, 64, -1, [](auto* b, int i) { return Value{crumb(b, i) - 1}; }},
};

template <class T>
std::vector<T> random_values(int64_t n, int lo, int hi) {
  static std::mt19937 engine(5);
  std::uniform_int_distribution<int> pick(lo, hi);
  std::vector<T> values(static_cast<size_t>(n));
  for (T& v : values) v = static_cast<T>(pick(engine));
  return values;
}

TEST(PackGguf, HoldsEveryCodeAndParameter) {
  for (const Case& c : kCases) {
    const GgufType* type = gguf_type(c.name);
    ASSERT_NE(type, nullptr) << c.name;
    const int64_t n = kBlocks * type->values;
    const int64_t groups = type->group > 0 ? n / type->group : 0;
    const auto codes = random_values<uint8_t>(n, c.code_min, c.code_max);
    const auto scales = random_values<uint8_t>(groups, c.scale_min, c.scale_max);
    const auto minimums = random_values<uint8_t>(groups, 0, c.minimum_max);
    const auto d = random_values<uint16_t>(kBlocks, 0, 65535), m = random_values<uint16_t>(kBlocks, 0, 65535);
    Bytes out(static_cast<size_t>(kBlocks * type->bytes), 0xaa);
    type->pack({codes.data(), d.data(), m.data(), scales.data(), minimums.data()}, kBlocks, out.data());
    const int wrap = c.code_min < 0 ? 128 : 256;
    const int scale_wrap = c.scale_min < 0 ? 128 : 256;
    for (int b = 0; b < kBlocks; ++b) {
      const uint8_t* block = out.data() + b * type->bytes;
      if (c.d_at >= 0) {
        EXPECT_EQ(block[c.d_at] | block[c.d_at + 1] << 8, d[static_cast<size_t>(b)]) << c.name;
      }
      if (c.m_at >= 0) {
        EXPECT_EQ(block[c.m_at] | block[c.m_at + 1] << 8, m[static_cast<size_t>(b)]) << c.name;
      }
      for (int i = 0; i < type->values; ++i) {
        const Value found = c.read(block, i);
        const auto at = static_cast<size_t>(b * type->values + i);
        ASSERT_EQ(found.code, codes[at] >= wrap ? codes[at] - 256 : codes[at]) << c.name << " value " << i;
        if (groups == 0) continue;
        const size_t group = at / static_cast<size_t>(type->group);
        ASSERT_EQ(found.scale, scales[group] >= scale_wrap ? scales[group] - 256 : scales[group]) << c.name;
        ASSERT_EQ(found.minimum, minimums[group]) << c.name;
      }
    }
  }
}

TEST(PackGguf, TypesAreFoundByName) {
  EXPECT_EQ(gguf_type("Q4_K")->bytes, 144);
  EXPECT_EQ(gguf_type("IQ2_XXS"), nullptr);
  EXPECT_EQ(gguf_type(""), nullptr);
}

}  // namespace
}  // namespace phiquant
