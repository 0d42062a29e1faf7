// Histograms of values: equal bins over a given range, and dyadic ones, which merge exactly.
//
// Dyadic: bins of width 2^exponent whose edges are multiples of it, `bins` on each side of zero. Value x falls in
//   bins + floor(|x| / 2^exponent)      if its sign bit is clear,
//   bins - 1 - floor(|x| / 2^exponent)  if it is set,
// and exponent is the smallest with |x| < bins * 2^exponent for all values (at least -126). Doubling the width only
// adds neighbouring bins, and scaling by a power of two is exact, so the histogram is a function of the set of
// values: it does not matter in which order, in how many parts or by how many threads they are seen.
//
// x is n values of type `dtype`, n < 2^31. A value that is not finite is passed over. Counts are the same at every
// CPU level.
#pragma once

#include <cstdint>
#include <limits>

#include "core/types.h"

namespace phiquant {

// Equal bins over [lo, hi], lo < hi: bin trunc((x - lo) * bins / (hi - lo)) in float32, as torch.histc computes it;
// the last one holds hi. Values outside are passed over. bins <= 32768.
struct LinearBins {
  float lo;
  float hi;
  int64_t bins;
};

// How many copies of a table the counting loops keep: a counter that was written just now is not read again at
// once, which would wait for the write.
constexpr int64_t kTables = 4;
constexpr int64_t kMaxBins = 32768;

// Length of one table: the bins, one that nobody reads for the values passed over, and room to the next cache line.
constexpr int64_t table_length(int64_t bins) { return (bins + 1 + 15) / 16 * 16; }

constexpr int kMinExponent = -126;

// A dyadic histogram being filled. tables: kTables * table_length(2 * bins) zeros at the start; the count of bin i is
// the sum of tables[k * table_length(2 * bins) + i] over k. bins: a power of two, 4 (so that 2^-exponent is a normal
// number) to kMaxBins / 2.
struct DyadicBins {
  int32_t* tables;
  int64_t bins;
  int exponent = kMinExponent;
  float lo = std::numeric_limits<float>::infinity();  // of the finite values
  float hi = -std::numeric_limits<float>::infinity();
};

struct HistogramKernels {
  // tables: kTables * table_length(bins) counts, added to.
  void (*linear)(const void* x, Dtype dtype, int64_t n, LinearBins bins, int32_t* tables);
  void (*dyadic)(const void* x, Dtype dtype, int64_t n, DyadicBins& bins);
};

const HistogramKernels& histogram_kernels();

// The exponent that values up to `absmax` need: absmax < bins * 2^exponent.
int dyadic_exponent(float absmax, int64_t bins);

// Raises the exponent of counts [2 * bins] by `steps`: 2^steps neighbours become one bin.
void coarsen(int64_t* counts, int64_t bins, int steps);
// Raises the exponent of a histogram being filled to `exponent`.
void coarsen(DyadicBins& bins, int exponent);

// counts[bins] += the sum of the tables.
void add_tables(const int32_t* tables, int64_t bins, int64_t* counts);

extern const HistogramKernels histogram_ref;
extern const HistogramKernels histogram_avx2;
extern const HistogramKernels histogram_avx512;

}  // namespace phiquant
