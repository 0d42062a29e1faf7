// The stages of hadamard_ref.cpp over vectors. Strides below the width of a vector are done on W vectors at once,
// transposed, so that partners lie in different vectors. Included once by each vector level.

#include "core/hadamard.h"

namespace phiquant {
namespace {

template <class V>
struct HadamardLevel {
  using F = typename V::F;
  static constexpr int64_t W = V::width;

  static void butterfly(F& a, F& b) {
    const F sum = V::add(a, b);
    b = V::sub(a, b);
    a = sum;
  }

  // W * W values from x on: their signs, and the stages of strides 1 to W / 2.
  static void narrow(float* x, const float* signs) {
    F v[W];
    for (int64_t i = 0; i < W; ++i) {
      v[i] = V::load(x + i * W);
      if (signs) v[i] = V::mul(v[i], V::load(signs + i * W));
    }
    V::transpose(v);
    for (int64_t stride = 1; stride < W; stride *= 2) {
      for (int64_t start = 0; start < W; start += 2 * stride) {
        for (int64_t i = start; i < start + stride; ++i) butterfly(v[i], v[i + stride]);
      }
    }
    V::transpose(v);
    for (int64_t i = 0; i < W; ++i) V::store(x + i * W, v[i]);
  }

  static void wide(float* x, int64_t n, int64_t stride) {
    for (int64_t start = 0; start < n; start += 2 * stride) {
      for (int64_t i = start; i < start + stride; i += W) {
        F a = V::load(x + i);
        F b = V::load(x + i + stride);
        butterfly(a, b);
        V::store(x + i, a);
        V::store(x + i + stride, b);
      }
    }
  }

  // The product with B and the scale, for the W columns from x on.
  static void base(float* x, const Hadamard& h) {
    F in[kHadamardBase];
    for (int64_t i = 0; i < h.base; ++i) in[i] = V::load(x + i * h.power);
    const F scale = V::set1(h.scale);
    for (int64_t j = 0; j < h.base; ++j) {
      F sum = in[0];
      if (h.base > 1) {
        sum = V::mul(sum, V::set1(h.matrix[j]));
        for (int64_t i = 1; i < h.base; ++i) sum = V::add(sum, V::mul(in[i], V::set1(h.matrix[i * h.base + j])));
      }
      V::store(x + j * h.power, V::mul(sum, scale));
    }
  }

  static void rotate(float* x, int64_t rows, const Hadamard& h) {
    const int64_t n = h.base * h.power;
    if (h.power < W || n % (W * W)) return hadamard_ref.rotate(x, rows, h);
    for (int64_t row = 0; row < rows; ++row, x += n) {
      for (int64_t i = 0; i < n; i += W * W) narrow(x + i, h.signs ? h.signs + i : nullptr);
      for (int64_t stride = W; stride < h.power; stride *= 2) wide(x, n, stride);
      for (int64_t c = 0; c < h.power; c += W) base(x + c, h);
    }
  }

  static constexpr HadamardKernels table = {.rotate = rotate};
};

}  // namespace
}  // namespace phiquant
