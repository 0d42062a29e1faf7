// The meaning of the histogram kernels, a value at a time.
#include <algorithm>
#include <cmath>

#include "core/half.h"
#include "core/histogram.h"

namespace phiquant {
namespace {

template <class Body>
void for_values(const void* x, Dtype dtype, int64_t n, Body f) {
  auto run = [&](const auto* values) {
    for (int64_t i = 0; i < n; ++i) f(to_float(values[i]));
  };
  if (dtype == Dtype::f32) return run(static_cast<const float*>(x));
  if (dtype == Dtype::bf16) return run(static_cast<const bf16*>(x));
  run(static_cast<const f16*>(x));
}

void linear(const void* x, Dtype dtype, int64_t n, LinearBins b, int32_t* tables) {
  for_values(x, dtype, n, [&](float v) {
    if (!(b.lo <= v && v <= b.hi)) return;
    const float place = (v - b.lo) * static_cast<float>(b.bins) / (b.hi - b.lo);
    ++tables[std::min(static_cast<int64_t>(place), b.bins - 1)];
  });
}

void dyadic(const void* x, Dtype dtype, int64_t n, DyadicBins& b) {
  for_values(x, dtype, n, [&](float v) {
    if (!std::isfinite(v)) return;
    b.lo = std::min(b.lo, v);
    b.hi = std::max(b.hi, v);
    const int needed = dyadic_exponent(std::fabs(v), b.bins);
    if (needed > b.exponent) coarsen(b, needed);
    const auto step = static_cast<int64_t>(std::ldexp(std::fabs(v), -b.exponent));
    ++b.tables[std::signbit(v) ? b.bins - 1 - step : b.bins + step];
  });
  b.lo += 0.0f;  // -0 becomes +0: which of them came first must not show
  b.hi += 0.0f;
}

}  // namespace

const HistogramKernels histogram_ref = {.linear = linear, .dyadic = dyadic};

}  // namespace phiquant
