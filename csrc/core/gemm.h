// Products of 8-bit codes in 32-bit integers: y [M, N] from x [M, K], unsigned, and w [N, K], signed.
//
//     sum[m, n] = sum over k of x[m, k] w[n, k]  +  column[n]  -  row[m] factor[n]
//
// The zero points of an affine layer live in the last two terms. With r = s (q - z) for x and w,
//     sum (x - zx)(w - zw) = sum x w - zx (sum w - K zw) - zw sum x
// The middle term depends on n alone and goes into `column`, with the bias (fold_zero_point). The last
// is there where weights have zero points: row = the sums of x's rows, factor = zw. Where each row of x has
// a zero point of its own, row = these and factor = the sums of w's rows.
//
// Arithmetic is modulo 2^32, so only the final sum must fit in 32 bits. Every level gives the same bits.
// Int8 activations are the same bytes with the top bit flipped, and a zero point 128 higher.
#pragma once

#include <cstdint>

#include "core/requantize.h"
#include "core/types.h"

namespace phiquant {

// K as the kernels see it: a multiple of 4. Rows of x are padded to it, weights beyond K are 0.
constexpr int64_t kQuad = 4;
static inline int64_t padded(int64_t k) { return (k + kQuad - 1) / kQuad * kQuad; }

// Packed weights: panels of 16 rows of w; in a panel, for every 4 consecutive k, the 4 codes of row 0, of
// row 1 and so on, in 64 bytes. Rows and k beyond the end are 0.
constexpr int64_t kPanel = 16;
static inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// w int8 [n, k] -> packed [panels(n), padded(k) / 4, 16, 4], and sums int32 [n] of the rows of w.
void pack_weight(const int8_t* w, int64_t n, int64_t k, int8_t* packed, int32_t* sums);

// column[n] = bias[n] - zx (sums[n] - k zw[n]); bias and zw may be null (0).
void fold_zero_point(const int32_t* bias, const int32_t* sums, const int32_t* zw, int32_t zx, int64_t n, int64_t k,
                     int32_t* column);

// Rows of codes as the kernels read them: x uint8 or (flip) int8 [rows, k] -> y uint8 [rows, padded(k)].
void pad_rows(const uint8_t* x, bool flip, int64_t rows, int64_t k, uint8_t* y);

// sums[r] = the sum of the first k values of row r; x [rows, padded(k)].
void row_sums(const uint8_t* x, int64_t rows, int64_t k, int32_t* sums);

// One product, or a part of one: `rows` rows of x and `n` columns that begin at a panel.
struct Gemm {
  const uint8_t* x;  // [rows, k]
  int64_t rows;
  int64_t k;  // padded
  const int8_t* packed;
  int64_t n;
  const int32_t* column;  // [n]
  const int32_t* row;     // [rows], or null with factor
  const int32_t* factor;  // [n]
};

// How sums become floats: y = float(sum) column_scale[n] row_scale[m] + bias[n], in fp32, in this order.
struct Rescale {
  const float* row_scale;     // [rows]
  const float* column_scale;  // [n]
  const float* bias;          // [n] or null
  Dtype dtype;
};

struct GemmKernels {
  int64_t columns;  // how many columns are computed at a time: a good unit of work for a thread
  // Each writes [rows, n]; rows of y lie `stride` values apart.
  void (*sums)(const Gemm& g, int32_t* y, int64_t stride);
  void (*codes)(const Gemm& g, const Requantize& r, uint8_t* y, int64_t stride);
  void (*floats)(const Gemm& g, const Rescale& r, void* y, int64_t stride);
  // The last step alone: sums [rows, n] -> codes [rows, n].
  void (*requantize)(const int32_t* sums, int64_t rows, int64_t n, const Requantize& r, uint8_t* y);
};

const GemmKernels& gemm_kernels();

// `ref` is the meaning; the others must equal it.
extern const GemmKernels gemm_ref;
extern const GemmKernels gemm_avx2;
extern const GemmKernels gemm_avx512;
extern const GemmKernels gemm_avx512vnni;

}  // namespace phiquant
