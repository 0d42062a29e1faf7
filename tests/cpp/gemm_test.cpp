// Products of codes against sums in 64 bits; every level against the scalar one.
#include "core/gemm.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#include "core/half.h"
#include "core/im2col.h"
#include "support.h"

namespace phiquant {
namespace {

template <class T>
std::vector<T> random_integers(int64_t n, int lo, int hi, uint32_t seed) {
  std::mt19937 engine(seed);
  std::uniform_int_distribution<int> pick(lo, hi);
  std::vector<T> values(static_cast<size_t>(n));
  for (T& v : values) v = static_cast<T>(pick(engine));
  return values;
}

// A product with all its terms, from plain matrices.
struct Case {
  int64_t m, n, k;
  std::vector<uint8_t> x;
  std::vector<int8_t> w;
  std::vector<int32_t> bias, zw;
  int32_t zx;
  std::vector<uint8_t> rows;
  std::vector<int8_t> packed;
  std::vector<int32_t> sums, column, row;

  Case(int64_t m_, int64_t n_, int64_t k_, int32_t zx_, bool extreme = false) : m(m_), n(n_), k(k_), zx(zx_) {
    x = random_integers<uint8_t>(m * k, extreme ? 255 : 0, 255, 1);
    w = random_integers<int8_t>(n * k, -128, extreme ? -128 : 127, 2);
    bias = random_integers<int32_t>(n, -100000, 100000, 3);
    zw = random_integers<int32_t>(n, -128, 127, 4);
    rows.resize(static_cast<size_t>(m * padded(k)));
    pad_rows(x.data(), false, m, k, rows.data());
    packed.resize(static_cast<size_t>(panels(n) * kPanel * padded(k)));
    for (auto* v : {&sums, &column}) v->resize(static_cast<size_t>(n));
    row.resize(static_cast<size_t>(m));
    pack_weight(w.data(), n, k, packed.data(), sums.data());
    fold_zero_point(bias.data(), sums.data(), zw.data(), zx, n, k, column.data());
    row_sums(rows.data(), m, k, row.data());
  }
  Gemm product() const { return {rows.data(), m, padded(k), packed.data(), n, column.data(), row.data(), zw.data()}; }

  int64_t exact(int64_t i, int64_t j) const {
    int64_t sum = bias[static_cast<size_t>(j)];
    for (int64_t l = 0; l < k; ++l) {
      const int64_t a = x[static_cast<size_t>(i * k + l)] - zx;
      sum += a * (w[static_cast<size_t>(j * k + l)] - zw[static_cast<size_t>(j)]);
    }
    return sum;
  }
};

TEST(Gemm, SumsAreExactAtEveryLevel) {
  for (const auto& [m, n, k] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1},
                                {1, 16, 4},
                                {2, 17, 3},
                                {3, 31, 5},
                                {5, 33, 64},
                                {6, 64, 7},
                                {7, 65, 130},
                                {8, 80, 33},
                                {9, 100, 1},
                                {14, 129, 66},
                                {1, 200, 300},
                                {40, 10, 9},
                                {2, 3, 0}}) {
    const Case c(m, n, k, 113);
    for (const Level level : available_levels()) {
      const LevelGuard guard(level);
      std::vector<int32_t> y(static_cast<size_t>(m * n), -1);
      gemm_kernels().sums(c.product(), y.data(), n);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          ASSERT_EQ(y[static_cast<size_t>(i * n + j)], c.exact(i, j))
              << level_name(level) << " " << m << " " << n << " " << k;
        }
      }
    }
  }
}

// 255 * 128 * 2 exceeds 16 bits: an instruction that saturates there (vpmaddubsw) would be found out.
TEST(Gemm, NothingSaturatesAtTheExtremes) {
  const Case c(7, 40, 1024, 0, true);
  for (const Level level : available_levels()) {
    const LevelGuard guard(level);
    std::vector<int32_t> y(static_cast<size_t>(c.m * c.n));
    Gemm g = c.product();
    g.row = g.factor = nullptr;
    const std::vector<int32_t> none(static_cast<size_t>(c.n), 0);
    g.column = none.data();
    gemm_kernels().sums(g, y.data(), c.n);
    for (const int32_t v : y) ASSERT_EQ(v, -255 * 128 * 1024) << level_name(level);
  }
}

TEST(Gemm, ArithmeticIsModuloTwoToTheThirtyTwo) {
  Case c(3, 18, 8, 5);
  for (int32_t& v : c.column) v = 2147483647;
  std::vector<int32_t> expected(static_cast<size_t>(c.m * c.n));
  gemm_ref.sums(c.product(), expected.data(), c.n);
  for (const Level level : available_levels()) {
    const LevelGuard guard(level);
    std::vector<int32_t> y(expected.size());
    gemm_kernels().sums(c.product(), y.data(), c.n);
    EXPECT_EQ(y, expected) << level_name(level);
  }
}

TEST(Gemm, CodesAreTheSumsRequantized) {
  const Case c(11, 75, 47, 200);
  std::vector<int32_t> multiplier, shift;
  for (int64_t j = 0; j < c.n; ++j) {
    const Multiplier m = quantize_multiplier(1e-4 * static_cast<double>(j + 1) * (j == 7 ? 1e6 : 1));
    multiplier.push_back(m.multiplier);
    shift.push_back(m.shift);
  }
  const Requantize r{multiplier.data(), shift.data(), -7, -128, 127};
  for (const Level level : available_levels()) {
    const LevelGuard guard(level);
    constexpr int64_t kStride = 80;
    std::vector<uint8_t> y(static_cast<size_t>(c.m * kStride), 0xee);
    gemm_kernels().codes(c.product(), r, y.data(), kStride);
    for (int64_t i = 0; i < c.m; ++i) {
      for (int64_t j = 0; j < kStride; ++j) {
        const uint8_t found = y[static_cast<size_t>(i * kStride + j)];
        if (j >= c.n) {
          ASSERT_EQ(found, 0xee) << "written beyond the row";
          continue;
        }
        const auto n = static_cast<size_t>(j);
        const int32_t v = multiply(static_cast<int32_t>(c.exact(i, j)), {multiplier[n], shift[n]});
        ASSERT_EQ(static_cast<int8_t>(found), std::clamp(v - 7, -128, 127)) << level_name(level);
      }
    }
  }
}

TEST(Gemm, FloatsAreTheSumsRescaled) {
  const Case c(9, 35, 21, 0);
  const auto row_scale = gaussian(c.m, 1);
  const auto column_scale = gaussian(c.n, 2);
  const auto bias = gaussian(c.n, 3);
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    for (const bool with_bias : {false, true}) {
      std::vector<float> expected;
      for (int64_t i = 0; i < c.m; ++i) {
        for (int64_t j = 0; j < c.n; ++j) {
          const auto n = static_cast<size_t>(j);
          const float v = static_cast<float>(c.exact(i, j)) * column_scale[n] * row_scale[static_cast<size_t>(i)];
          expected.push_back(with_bias ? v + bias[n] : v);
        }
      }
      for (const Level level : available_levels()) {
        const LevelGuard guard(level);
        const std::vector<char> stored = store_as(dtype, expected);
        std::vector<char> y(stored.size());
        gemm_kernels().floats(c.product(),
                              {row_scale.data(), column_scale.data(), with_bias ? bias.data() : nullptr, dtype},
                              y.data(), c.n);
        EXPECT_EQ(y, stored) << level_name(level);
      }
    }
  }
}

TEST(Gemm, Int8ActivationsAreFlippedAndPadded) {
  const std::vector<int8_t> x = {-128, 127, 0, -1, 5, 6};
  std::vector<uint8_t> y(8, 9);
  pad_rows(reinterpret_cast<const uint8_t*>(x.data()), true, 2, 3, y.data());
  EXPECT_EQ(y, (std::vector<uint8_t>{0, 255, 128, 0, 127, 133, 134, 0}));
}

TEST(Im2col, RowsAreWindows) {
  Window w{5, 6, 4, 2, {3, 2}, {2, 1}, {1, 2}, {1, 2}};
  const auto x = random_integers<uint8_t>(2 * 5 * 6 * 4, 0, 255, 9);
  const int64_t length = w.length();
  const int64_t rows = 2 * w.out(0) * w.out(1);
  EXPECT_EQ(w.out(0), 3);
  EXPECT_EQ(w.out(1), 8);
  for (int64_t group = 0; group < 2; ++group) {
    std::vector<uint8_t> y(static_cast<size_t>((rows - 3) * padded(length)));
    im2col(x.data(), w, group, 3, rows - 3, 77, y.data());
    size_t at = 0;
    for (int64_t row = 3; row < rows; ++row) {
      for (int64_t i = 0; i < 3; ++i) {
        for (int64_t j = 0; j < 2; ++j) {
          for (int64_t c = 0; c < 2; ++c) {
            const int64_t line = row / 8 % 3 * 2 - 1 + i;
            const int64_t column = row % 8 - 2 + 2 * j;
            const bool inside = line >= 0 && line < 5 && column >= 0 && column < 6;
            const int64_t from = ((row / 24 * 5 + line) * 6 + column) * 4 + group * 2 + c;
            ASSERT_EQ(y[at++], inside ? x[static_cast<size_t>(from)] : 77);
          }
        }
      }
      at += static_cast<size_t>(padded(length) - length);
    }
  }
}

}  // namespace
}  // namespace phiquant
