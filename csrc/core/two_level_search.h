// Scales stored in two levels, made better for the values that they will hold.
//
// Given codes of scales (and minimums) and the super-block scales, all as stored, each round
//   tries for every block the codes next to its own, two to either side, and
//   fits the super-block's scales to the codes of its values by least squares, rounded to their storage,
// and keeps what lowers the weighed squared error. So no super-block is worse than before.
// s = D c, m = -(D' c'), in fp32, as csrc/core/two_level.h has them.
#pragma once

#include "core/search.h"

namespace phiquant {

struct TwoLevelGrid {
  RangeSpec block;   // of the values: their grid; rule minimum, or one without offset
  float qmin, qmax;  // of the integer codes of scales
  Storage storage;   // of the super-block scales
  int64_t subs;      // blocks in a super-block
};

// All in place, fp32: codes of scales and minimums [blocks], super-block scales [blocks / subs]; minimums null without
// such. layout: of the values, layout.blocks a multiple of subs, no block above 4096 values.
struct TwoLevelParams {
  float* scales;
  float* minimums;
  float* super_scales;
  float* super_minimums;
};

struct TwoLevelSearchKernels {
  void (*refine)(const void* x, Layout layout, const TwoLevelGrid& grid, Weights weights, int rounds,
                 TwoLevelParams params);
};

const TwoLevelSearchKernels& two_level_search_kernels();

extern const TwoLevelSearchKernels two_level_search_ref;
extern const TwoLevelSearchKernels two_level_search_avx2;
extern const TwoLevelSearchKernels two_level_search_avx512;

}  // namespace phiquant
