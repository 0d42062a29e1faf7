// Half-quadratic quantization: the offset, or the scale, of each block that makes sum |x - y|^p small for p < 1.
//
// With p below 1 a few large errors count for little, and the others are made smaller. Badri and Shaji (2023) put an
// error e beside x - y and take turns: codes are rounded, e = shrink(x - y), the parameter is fitted to x - e by least
// squares. Errors are taken in units of the block's first scale, so that the result does not depend on the size of x:
//
//   shrink(d) = sign(d) max(|d| - |d|^(p-1) / beta, 0),     beta grows by kappa with each iteration
//   minimum       m += mean(d - e)
//   zero point    as the minimum -s z; z is then rounded, and kept if better; then the scale
//   no offset     s *= (x - e).y / y.y
//
// Minimum and scale are rounded to their storage before codes are, in each iteration. The iterate of least sum |d|^p
// is the result. A block stops by itself, where its parameter moves by less than kStill; the others do not matter.
// The result replaces the start only if better by more than fp32 can be wrong, so it is never worse.
//
// A block that holds a value that is not finite gets a NaN scale.
#pragma once

#include "core/affine.h"

namespace phiquant {

struct HqqSettings {
  float power = 0.7f;  // p, in (0, 1]
  float beta = 10.0f;
  float kappa = 1.01f;
  int iterations = 20;
};

struct HqqKernels {
  // scale, offset fp32 [blocks]: the start, as stored, replaced by the result. x as in affine.h, and any grid but of
  // tables of more than 16 levels.
  void (*solve)(const void* x, Layout layout, RangeSpec spec, HqqSettings settings, float* scale, float* offset);
};

// The kernels of the current CPU level (core/cpu.h). All levels give the same bits.
const HqqKernels& hqq_kernels();

extern const HqqKernels hqq_ref;
extern const HqqKernels hqq_avx2;
extern const HqqKernels hqq_avx512;

}  // namespace phiquant
