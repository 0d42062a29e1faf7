// The kernels of gemm_ref.cpp over vectors; included once by each vector level.
//
// A tile of sums, V::kRows rows by V::kPanels panels, stays in registers for the whole length of k: the
// panels of w (16 k bytes each) come from the second-level cache, x is read in dwords, each spread
// over a vector. Then the tile goes through a small buffer, where the zero points' terms are added and
// the sums become codes or floats.

#include <immintrin.h>

#include <cstring>

#include "core/gemm.h"

namespace phiquant {
namespace {

template <class V>
struct Products {
  using I = typename V::I;
  using F = typename V::F;
  static constexpr int64_t W = V::width;
  static constexpr int kVectors = static_cast<int>(kPanel / W);  // of a panel
  static constexpr int64_t kColumns = V::kPanels * kPanel;

  // The first n values; the other lanes are 0.
  template <class T>
  static auto load_part(const T* p, int64_t n) {
    if (n >= W) return V::load(p);
    T buffer[W] = {};
    std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
    return V::load(buffer);
  }
  // Calls store(pointer to W values) on y itself, or on a buffer whose first n values are copied to y.
  template <class T, class Store>
  static void store_part(T* y, int64_t n, Store store) {
    if (n >= W) return store(y);
    T buffer[W];
    store(buffer);
    std::memcpy(y, buffer, static_cast<size_t>(n) * sizeof(T));
  }

  // sums [kR, kP * 16] of kR rows of x and kP panels. The short loops are unrolled whole, and nothing is called,
  // so that the sums stay in registers.
  template <int kR, int kP>
  [[gnu::noinline]] static void tile(const uint8_t* x, int64_t k, const int8_t* packed, int32_t* sums) {
    constexpr int kN = kP * kVectors;
    I sum[kR * kN];
#pragma GCC unroll 32
    for (int i = 0; i < kR * kN; ++i) sum[i] = V::zero();
    for (int64_t i = 0; i < k; i += kQuad, packed += kPanel * kQuad) {
      decltype(V::weights(packed)) w[kN];
#pragma GCC unroll 32
      for (int j = 0; j < kN; ++j) w[j] = V::weights(packed + j / kVectors * kPanel * k + j % kVectors * W * kQuad);
#pragma GCC unroll 32
      for (int j = 0; j < kR * kN; ++j) {
        int32_t quad;
        std::memcpy(&quad, x + j / kN * k + i, kQuad);
        sum[j] = V::dot(sum[j], V::broadcast(quad), w[j % kN]);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kR * kN; ++i) V::store(sums + i * W, sum[i]);
  }

  // The tile for any number of rows up to kRows and of panels up to kPanels.
  template <int kR = V::kRows, int kP = V::kPanels>
  static void any_tile(int64_t rows, int64_t width, const uint8_t* x, int64_t k, const int8_t* packed, int32_t* sums) {
    if constexpr (kR > 1) {
      if (rows < kR) return any_tile<kR - 1, kP>(rows, width, x, k, packed, sums);
    }
    if constexpr (kP > 1) {
      if (width < kP) return any_tile<kR, kP - 1>(rows, width, x, k, packed, sums);
    }
    tile<kR, kP>(x, k, packed, sums);
  }

  // Calls finish(sums, m, n, count) with every vector of final sums: row m, columns n to n + count.
  template <class Finish>
  static void for_sums(const Gemm& g, Finish finish) {
    alignas(64) int32_t sums[V::kRows * kColumns];
    for (int64_t n = 0; n < g.n; n += kColumns) {
      const int64_t columns = g.n - n < kColumns ? g.n - n : kColumns;
      const int64_t stride = panels(columns) * kPanel;
      const int8_t* packed = g.packed + n / kPanel * g.k * kPanel;
      for (int64_t m = 0; m < g.rows; m += V::kRows) {
        const int64_t rows = g.rows - m < V::kRows ? g.rows - m : V::kRows;
        any_tile(rows, panels(columns), g.x + m * g.k, g.k, packed, sums);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t j = 0; j < columns; j += W) {
            const int64_t count = columns - j < W ? columns - j : W;
            I sum = V::add(V::load(sums + r * stride + j), load_part(g.column + n + j, count));
            if (g.row) sum = V::sub(sum, V::mul_low(V::set1(g.row[m + r]), load_part(g.factor + n + j, count)));
            finish(sum, m + r, n + j, count);
          }
        }
      }
    }
  }

  static I code(I sum, const Requantize& r, int64_t n, int64_t count) {
    const I multiplier = load_part(r.multiplier + n, count);
    const I shift = load_part(r.shift + n, count);
    // A left shift that would overflow is cut short: the product stays far beyond any code either way.
    const I left = V::max(V::sub(V::zero(), shift), V::zero());
    const I bound = V::shift_right(V::set1(INT32_MAX), left);
    const I held = V::max(V::min(sum, bound), V::sub(V::set1(-1), bound));
    const I high = V::doubling_high(V::shift_left(held, left), multiplier);
    const I right = V::max(shift, V::zero());
    const I mask = V::sub(V::shift_left(V::set1(1), right), V::set1(1));
    const I negative = V::shift_right(high, V::set1(31));  // -1 or 0
    const I threshold = V::sub(V::shift_right(mask, V::set1(1)), negative);
    const I scaled = V::add_one_where_greater(V::shift_right(high, right), V::and_(high, mask), threshold);
    // Clamped before the zero point is added: the sum of both may not fit.
    const I low = V::max(scaled, V::set1(r.qmin - r.zero_point));
    return V::add(V::min(low, V::set1(r.qmax - r.zero_point)), V::set1(r.zero_point));
  }

  static void sums(const Gemm& g, int32_t* y, int64_t stride) {
    for_sums(g, [&](I sum, int64_t m, int64_t n, int64_t count) {
      store_part(y + m * stride + n, count, [&](int32_t* p) { V::store(p, sum); });
    });
  }

  static void codes(const Gemm& g, const Requantize& r, uint8_t* y, int64_t stride) {
    for_sums(g, [&](I sum, int64_t m, int64_t n, int64_t count) {
      store_part(y + m * stride + n, count, [&](uint8_t* p) { V::store_bytes(p, code(sum, r, n, count)); });
    });
  }

  template <class T>
  static void floats_of(const Gemm& g, const Rescale& r, T* y, int64_t stride) {
    for_sums(g, [&](I sum, int64_t m, int64_t n, int64_t count) {
      F v = V::mul(V::to_float(sum), load_part(r.column_scale + n, count));
      v = V::mul(v, V::set1(r.row_scale[m]));
      if (r.bias) v = V::add(v, load_part(r.bias + n, count));
      store_part(y + m * stride + n, count, [&](T* p) { V::store(p, v); });
    });
  }

  static void floats(const Gemm& g, const Rescale& r, void* y, int64_t stride) {
    switch (r.dtype) {
      case Dtype::f32:
        return floats_of(g, r, static_cast<float*>(y), stride);
      case Dtype::bf16:
        return floats_of(g, r, static_cast<bf16*>(y), stride);
      case Dtype::f16:
        return floats_of(g, r, static_cast<f16*>(y), stride);
    }
  }

  static void requantize(const int32_t* sums, int64_t rows, int64_t n, const Requantize& r, uint8_t* y) {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t j = 0; j < n; j += W) {
        const int64_t count = n - j < W ? n - j : W;
        const I sum = load_part(sums + m * n + j, count);
        store_part(y + m * n + j, count, [&](uint8_t* p) { V::store_bytes(p, code(sum, r, j, count)); });
      }
    }
  }

  static constexpr GemmKernels table = {
      .columns = kColumns, .sums = sums, .codes = codes, .floats = floats, .requantize = requantize};
};

}  // namespace
}  // namespace phiquant
