// Affine grids: y = s * (q - z) or y = s * q + m. Range, encode, decode, fake-quantize and its mask.
//
// The one rounding rule: q = clamp(rne(x * (1/s)) + z, qmin, qmax), rne = to nearest, ties to even;
// with a minimum q = clamp(rne((x - m) * (1/s)), qmin, qmax). A NaN gets qmin, an infinity the end of
// the grid on its side. The mask of the straight-through estimator is taken before the clamp.
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
};

// The kernels of one CPU level. `code_signed`: codes are int8, else uint8.
struct AffineKernels {
  void (*quantize)(const void* x, Layout layout, BlockParams params, Grid grid, int8_t* codes);
  void (*dequantize)(const int8_t* codes, bool code_signed, Layout layout, BlockParams params, Offset offset, void* y);
  void (*fake_quantize)(const void* x, Layout layout, BlockParams params, Grid grid, void* y);
  // dx = grad where qmin <= rne(x / s) + z <= qmax, else 0 (selected, so an infinite grad is dropped too)
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
  // scale, offset fp32 [blocks] from the min-max range, or (mse) from the range of least squared error;
  // there too, a block that holds a value that is not finite gets a NaN scale.
  void (*choose_range)(const void* x, Layout layout, RangeSpec spec, bool mse, float* scale, float* offset);
};

// The kernels of the current CPU level (core/cpu.h).
const AffineKernels& affine_kernels();

// Parameters from known ranges, fp32 [blocks]. One rule for observers and kernels.
void params_from_ranges(const float* lo, const float* hi, int64_t blocks, RangeSpec spec, float* scale, float* offset);

// The tables behind affine_kernels(). `ref` is the meaning; the others must equal it.
extern const AffineKernels affine_ref;
extern const AffineKernels affine_avx2;
extern const AffineKernels affine_avx512;

}  // namespace phiquant
