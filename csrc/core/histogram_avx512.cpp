#include "core/histogram_simd.inl"
#include "core/vec_avx512.h"

namespace phiquant {

const HistogramKernels histogram_avx512 = Histogram<Avx512>::table;

}  // namespace phiquant
