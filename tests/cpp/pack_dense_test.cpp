// Codes side by side, against an unpacker that reads one code at a time.
#include "core/pack_dense.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace phiquant {
namespace {

int code_at(const std::vector<uint8_t>& packed, int64_t index, int bits) {
  const int64_t bit = index * bits;
  return packed[static_cast<size_t>(bit / 8)] >> (bit % 8) & ((1 << bits) - 1);
}

std::vector<uint8_t> random_bytes(int64_t n) {
  std::mt19937 engine(7);
  std::vector<uint8_t> bytes(static_cast<size_t>(n));
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(engine());
  return bytes;
}

class PackDense : public testing::TestWithParam<int> {};

TEST_P(PackDense, RowsBeginAtBytesAndEndInZeros) {
  const int bits = GetParam();
  for (const int64_t cols : {1, 7, 8, 15, 16, 33, 64}) {
    for (const int add : {0, 1, 1 << (bits - 1)}) {
      const int64_t rows = 3, stride = dense_bytes(cols, bits);
      const std::vector<uint8_t> codes = random_bytes(rows * cols);
      std::vector<uint8_t> out(static_cast<size_t>(rows * stride), 0xaa);
      pack_dense(codes.data(), rows, cols, bits, static_cast<uint8_t>(add), out.data());
      for (int64_t r = 0; r < rows; ++r) {
        const std::vector<uint8_t> row(out.begin() + r * stride, out.begin() + (r + 1) * stride);
        for (int64_t c = 0; c < stride * 8 / bits; ++c) {
          const int expected = c < cols ? (codes[static_cast<size_t>(r * cols + c)] + add) & ((1 << bits) - 1) : 0;
          ASSERT_EQ(code_at(row, c, bits), expected) << "bits " << bits << " row " << r << " column " << c;
        }
      }
    }
  }
}

TEST_P(PackDense, ColumnsComeInPiecesOfRows) {
  const int bits = GetParam();
  const int64_t width = 131, cols = 77;
  const std::vector<uint8_t> codes = random_bytes(width * cols);
  for (const int64_t step : {1, 5, 64, 131}) {
    std::vector<uint8_t> out(static_cast<size_t>(dense_bytes(cols * width, bits)));
    for (int64_t first = 0; first < width; first += step) {
      const int64_t rows = std::min(step, width - first);
      pack_columns(codes.data() + first * cols, rows, cols, bits, 3, first, width, out.data());
    }
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t r = 0; r < width; ++r) {
        const int expected = (codes[static_cast<size_t>(r * cols + c)] + 3) & ((1 << bits) - 1);
        ASSERT_EQ(code_at(out, c * width + r, bits), expected) << "bits " << bits << " row " << r << " column " << c;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, PackDense, testing::Values(1, 2, 4, 8));

}  // namespace
}  // namespace phiquant
