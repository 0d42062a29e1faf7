// Exact percentiles.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace phiquant {

// The quantile q (0 <= q <= 1) of the finite values of x, or of their magnitudes: between the two values nearest to
// place q (n - 1) in sorted order, linearly, in float64, then rounded to float32. Values that are not finite are passed
// over; NaN if none is left. O(n) time; needs 4 n bytes.
float percentile(const void* x, Dtype dtype, int64_t n, double q, bool magnitude);

}  // namespace phiquant
