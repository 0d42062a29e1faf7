// Gradients of fake quantization with a learned scale (LSQ) and offset (LSQ+): Esser et al. 2020, Bhalgat et al. 2020.
//
// Forward is affine.h's fake_quantize. With t = x (zero point) or x - m (minimum), v = t / s, c = the code less its
// zero point, clamp(rne(v), low, high), low = qmin - z, high = qmax - z:
//
//                      low <= rne(v) <= high    below, above, NaN
//   dx                 g                        0
//   ds     sum of      g (c - v)                g c
//   clipped, sum of    0                        g
//
// From `clipped` follow dm = clipped and dz = -s clipped. v is taken as the kernels encode, x * (1/s).
//
// Order of additions: value i of a block goes to lane
// i % 16, lanes are added as a tree every 4096 values, then in fp64. ops/learned.cpp cuts long blocks at
// fixed places and adds the pieces in their order: the sums do not depend on
// the number of threads, nor on the CPU level.
#pragma once

#include "core/affine.h"

namespace phiquant {

struct LearnedKernels {
  // dx: values of the layout's type, may not be grad or x. dscale, clipped: [blocks].
  void (*backward)(const void* grad, const void* x, Layout layout, BlockParams params, Grid grid, void* dx,
                   double* dscale, double* clipped);
};

// The kernels of the current CPU level (core/cpu.h).
const LearnedKernels& learned_kernels();

extern const LearnedKernels learned_ref;
extern const LearnedKernels learned_avx2;
extern const LearnedKernels learned_avx512;

}  // namespace phiquant
