// The reference kernels: the formulas of gemm.h and requantize.h, one value at a time.
#include "core/gemm.h"
#include "core/half.h"

namespace phiquant {
namespace {

// All sums are taken as unsigned numbers, where arithmetic modulo 2^32 is defined.
int32_t sum_at(const Gemm& g, int64_t m, int64_t n) {
  const uint8_t* x = g.x + m * g.k;
  const int8_t* w = g.packed + n / kPanel * g.k * kPanel + n % kPanel * kQuad;
  auto sum = static_cast<uint32_t>(g.column[n]);
  for (int64_t i = 0; i < g.k; ++i) {
    sum += static_cast<uint32_t>(int32_t{x[i]} * w[i / kQuad * kQuad * kPanel + i % kQuad]);
  }
  if (g.row) sum -= static_cast<uint32_t>(g.row[m]) * static_cast<uint32_t>(g.factor[n]);
  return static_cast<int32_t>(sum);
}

uint8_t code(int32_t sum, const Requantize& r, int64_t n) {
  const int64_t v = int64_t{multiply(sum, {r.multiplier[n], r.shift[n]})} + r.zero_point;
  return static_cast<uint8_t>(v < r.qmin ? r.qmin : v > r.qmax ? r.qmax : v);
}

// Calls put(sum, m, n) for every value.
template <class Put>
void for_sums(const Gemm& g, Put put) {
  for (int64_t m = 0; m < g.rows; ++m) {
    for (int64_t n = 0; n < g.n; ++n) put(sum_at(g, m, n), m, n);
  }
}

void sums(const Gemm& g, int32_t* y, int64_t stride) {
  for_sums(g, [&](int32_t sum, int64_t m, int64_t n) { y[m * stride + n] = sum; });
}

void codes(const Gemm& g, const Requantize& r, uint8_t* y, int64_t stride) {
  for_sums(g, [&](int32_t sum, int64_t m, int64_t n) { y[m * stride + n] = code(sum, r, n); });
}

template <class T>
void floats_of(const Gemm& g, const Rescale& r, T* y, int64_t stride) {
  for_sums(g, [&](int32_t sum, int64_t m, int64_t n) {
    const float v = static_cast<float>(sum) * r.column_scale[n] * r.row_scale[m];
    y[m * stride + n] = from_float<T>(r.bias ? v + r.bias[n] : v);
  });
}

void floats(const Gemm& g, const Rescale& r, void* y, int64_t stride) {
  switch (r.dtype) {
    case Dtype::f32:
      return floats_of(g, r, static_cast<float*>(y), stride);
    case Dtype::bf16:
      return floats_of(g, r, static_cast<bf16*>(y), stride);
    case Dtype::f16:
      return floats_of(g, r, static_cast<f16*>(y), stride);
  }
}

void requantize(const int32_t* sums, int64_t rows, int64_t n, const Requantize& r, uint8_t* y) {
  for (int64_t i = 0; i < rows * n; ++i) y[i] = code(sums[i], r, i % n);
}

}  // namespace

const GemmKernels gemm_ref = {
    .columns = kPanel, .sums = sums, .codes = codes, .floats = floats, .requantize = requantize};

}  // namespace phiquant
