// Grids of every element: range, encode, decode, fake-quantize and its mask.
//
// integer    y = s * (q - z) or y = s * q + m; q = clamp(rne(x * (1/s)) + z, qmin, qmax), rne = to nearest,
//            ties to even; with a minimum q = clamp(rne((x - m) * (1/s)), qmin, qmax).
// minifloat  y = s * v; v = t = x * (1/s), clamped to the largest value and rounded to a multiple of the
//            format's step at t, rne; the code is v's bit pattern. Infinities and NaN are decoded, never encoded.
// table      y = s * level[q]; q = the number of levels' midpoints that are <= t: a tie goes up.
//
// A NaN gets the lowest level, an infinity the end of the grid on its side. The straight-through
// estimator passes the gradient of a value that would get a code of the grid if the grid went on at its
// ends: integers rne(x / s) + z in [qmin, qmax]; minifloats |t| <= reach; tables t at most half the
// outermost gap beyond the outermost levels.
//
// x, y, grad are `blocks * block` values of type `dtype`; scale and offset are fp32 [blocks] and hold
// the values as stored; offset may be null (all zero). Arithmetic is fp32. Nothing is allocated,
// nothing is checked. Each function gives the same bits at every CPU level.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace phiquant {

// Where the values are and how they fall into blocks.
struct Layout {
  Dtype dtype;
  int64_t blocks;
  int64_t block;
};

// Stored parameters, fp32 [blocks] each.
struct BlockParams {
  const float* scale;
  const float* offset;
  const float* inverse = nullptr;  // null: 1 / scale. Rule::twn encodes by its threshold, not by its scale
};

// Sums are added up in pieces of this many values, so that threads may share them.
inline constexpr int64_t kSumPiece = 32768;

// The kernels of one CPU level. Codes of integers are int8 if grid.qmin < 0, all others uint8.
struct AffineKernels {
  void (*quantize)(const void* x, Layout layout, BlockParams params, Grid grid, int8_t* codes);
  void (*dequantize)(const int8_t* codes, Layout layout, BlockParams params, Grid grid, void* y);
  void (*fake_quantize)(const void* x, Layout layout, BlockParams params, Grid grid, void* y);
  // dx = grad where the estimator passes it, else 0 (selected, so an infinite grad is dropped too)
  void (*fake_quantize_backward)(const void* grad, const void* x, Layout layout, BlockParams params, Grid grid,
                                 void* dx);
  // The range of each block is found from x, then used at once while the block is in cache.
  // scale, offset fp32 [blocks]: the range that was found; a block that holds a value that is not finite
  // gets a NaN scale, so that its codes cannot be stored unseen.
  void (*quantize_dynamic)(const void* x, Layout layout, RangeSpec spec, int8_t* codes, float* scale, float* offset);
  void (*fake_quantize_dynamic)(const void* x, Layout layout, RangeSpec spec, void* y);
  void (*fake_quantize_dynamic_backward)(const void* grad, const void* x, Layout layout, RangeSpec spec, void* dx);
  // Whether all values are finite.
  bool (*all_finite)(const void* x, Layout layout);
  // lo, hi fp32 [blocks]; NaN is passed over; a block of NaN gives lo = inf, hi = -inf.
  void (*min_max)(const void* x, Layout layout, float* lo, float* hi);
  // sum, count [blocks]: of the |x| > above[block]; above null: of all but NaN. Value i of a piece is added in
  // lane i % 16; lanes are added as a tree every 4096 values, in fp64; then pieces of kSumPiece values.
  void (*abs_sum)(const void* x, Layout layout, const float* above, double* sum, int64_t* count);
  // scale, offset fp32 [blocks] by the spec's rule (search.h: from the range of least squared error).
  void (*choose_range)(const void* x, Layout layout, RangeSpec spec, float* scale, float* offset);
};

// The kernels of the current CPU level (core/cpu.h).
const AffineKernels& affine_kernels();

// Parameters from known ranges, fp32 [blocks]. One rule for observers and kernels. For absmean and twn hi
// is the mean that the scale is, and lo the threshold.
// inverse, if wanted: what values are multiplied by to encode them (BlockParams).
void params_from_ranges(const float* lo, const float* hi, int64_t blocks, RangeSpec spec, float* scale, float* offset,
                        float* inverse = nullptr);

// means [blocks] of what abs_sum found in `pieces` pieces of each block, times `factor`; 0 where nothing was counted.
void means_from_sums(const double* sums, const int64_t* counts, int64_t blocks, int64_t pieces, float factor,
                     float* means);

// The tables behind affine_kernels(). `ref` is the meaning; the others must equal it.
extern const AffineKernels affine_ref;
extern const AffineKernels affine_avx2;
extern const AffineKernels affine_avx512;

}  // namespace phiquant
