// The range of least squared error of each block: over a grid of shrunken ranges, and exactly.
//
// error(s) = sum over the block of (s q(x / s) - x)^2, q rounds and clamps to [qmin, qmax]; for minifloats and tables
// of up to 16 levels, with the rule absmax (tables: or signed_absmax), q is the nearest level, and there is the grid
// search alone.
//
// grid   The min-max range and shrunken ones: ratios 1 down to 0.4 in steps of 0.04, then around the best
//        in steps of 0.01 (20 in all); for signed_absmax both signs of the scale. A range is taken in place of min-max
//        only if its error, in fp32, is lower by more than fp32 can be wrong, so the result is never worse.
// exact  Where a code changes, s = |x_i| / (k + 1/2): between two such breakpoints all codes stand still, and the
//        best scale for codes q is (q.x) / (q.q), with error x.x - (q.x)^2 / (q.q). One sweep over the sorted
//        breakpoints, q.x and q.q updated at each, meets the codes of every scale, so also those of the best.
//        The scale found is rounded to its storage type; it and its neighbours of that type are taken only
//        if better than the grid search's. How each rule is swept:
//          absmax         the one sweep
//          signed_absmax  one sweep per sign of the scale
//          zero_point     one per zero point, up to 4 bits; with more bits the zero point stays the grid's
//          minimum        not exact: least-squares refits of scale and minimum to the codes of the grid's range
//        A block with more than 2^22 breakpoints is not swept: the grid is made finer around its best instead.
//
// With weights, one per column, an error counts as much as its weight says: the best range of the grid, then three
// refits of its scale (and minimum) to its codes by least squares, each kept only if better. Not exact.
//
// A block that holds a value that is not finite gets a NaN scale. x, scale, offset as in affine.h.
#pragma once

#include "core/affine.h"

namespace phiquant {

// values [columns], each at least 0: of value i those of column (first + i) % columns, where columns is a multiple of
// the block's length; columns 0: all values count alike.
struct Weights {
  const float* values = nullptr;
  int64_t columns = 0;
  int64_t first = 0;
};

struct SearchKernels {
  void (*search)(const void* x, Layout layout, RangeSpec spec, bool exact, Weights weights, float* scale,
                 float* offset);
};

// The kernels of the current CPU level (core/cpu.h). All levels give the same bits.
const SearchKernels& search_kernels();

extern const SearchKernels search_ref;
extern const SearchKernels search_avx2;
extern const SearchKernels search_avx512;

}  // namespace phiquant
