#include "core/histogram.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "core/cpu.h"

namespace phiquant {

const HistogramKernels& histogram_kernels() {
#ifdef PHIQUANT_X86
  return by_level(histogram_ref, histogram_avx2, histogram_avx512);
#else
  return histogram_ref;
#endif
}

int dyadic_exponent(float absmax, int64_t bins) {
  if (absmax == 0.0f) return kMinExponent;
  const int log2_bins = std::countr_zero(static_cast<uint64_t>(bins));
  return std::max(kMinExponent, std::ilogb(absmax) + 1 - log2_bins);  // absmax < 2^(ilogb + 1)
}

namespace {

template <class Count>
void coarsen_any(Count* counts, int64_t bins, int steps) {
  const int shift = std::min(steps, 62);
  for (int64_t i = 0; i < bins; ++i) {
    const int64_t to = i >> shift;
    const Count positive = counts[bins + i];
    const Count negative = counts[bins - 1 - i];
    counts[bins + i] = 0;
    counts[bins - 1 - i] = 0;
    counts[bins + to] += positive;
    counts[bins - 1 - to] += negative;
  }
}

}  // namespace

void coarsen(int64_t* counts, int64_t bins, int steps) { coarsen_any(counts, bins, steps); }

void coarsen(DyadicBins& b, int exponent) {
  for (int64_t k = 0; k < kTables; ++k) {
    coarsen_any(b.tables + k * table_length(2 * b.bins), b.bins, exponent - b.exponent);
  }
  b.exponent = exponent;
}

void add_tables(const int32_t* tables, int64_t bins, int64_t* counts) {
  for (int64_t k = 0; k < kTables; ++k) {
    for (int64_t i = 0; i < bins; ++i) counts[i] += tables[k * table_length(bins) + i];
  }
}

}  // namespace phiquant
