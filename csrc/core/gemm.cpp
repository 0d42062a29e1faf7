#include "core/gemm.h"

#include <algorithm>

#include "core/cpu.h"

namespace phiquant {

const GemmKernels& gemm_kernels() {
#ifdef PHIQUANT_X86
  return by_level(gemm_ref, gemm_avx2, gemm_avx512, gemm_avx512vnni);
#else
  return gemm_ref;
#endif
}

void pack_weight(const int8_t* w, int64_t n, int64_t k, int8_t* packed, int32_t* sums) {
  const int64_t panel_bytes = kPanel * padded(k);
  std::fill_n(packed, panels(n) * panel_bytes, int8_t{0});
  for (int64_t row = 0; row < n; ++row) {
    int8_t* out = packed + row / kPanel * panel_bytes + row % kPanel * kQuad;
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      out[i / kQuad * kQuad * kPanel + i % kQuad] = w[row * k + i];
      sum += w[row * k + i];
    }
    sums[row] = sum;
  }
}

void fold_zero_point(const int32_t* bias, const int32_t* sums, const int32_t* zw, int32_t zx, int64_t n, int64_t k,
                     int32_t* column) {
  const auto all = static_cast<uint32_t>(k);
  for (int64_t i = 0; i < n; ++i) {
    const auto sum = static_cast<uint32_t>(sums[i]) - all * static_cast<uint32_t>(zw ? zw[i] : 0);
    const auto b = static_cast<uint32_t>(bias ? bias[i] : 0);
    column[i] = static_cast<int32_t>(b - static_cast<uint32_t>(zx) * sum);
  }
}

void pad_rows(const uint8_t* x, bool flip, int64_t rows, int64_t k, uint8_t* y) {
  const uint8_t top = flip ? 0x80 : 0;
  const int64_t stride = padded(k);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < k; ++i) y[r * stride + i] = x[r * k + i] ^ top;
    for (int64_t i = k; i < stride; ++i) y[r * stride + i] = 0;
  }
}

void row_sums(const uint8_t* x, int64_t rows, int64_t k, int32_t* sums) {
  const int64_t stride = padded(k);
  for (int64_t r = 0; r < rows; ++r) {
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += x[r * stride + i];
    sums[r] = sum;
  }
}

}  // namespace phiquant
