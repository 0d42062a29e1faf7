#include "core/histogram_simd.inl"
#include "core/vec_avx2.h"

namespace phiquant {

const HistogramKernels histogram_avx2 = Histogram<Avx2>::table;

}  // namespace phiquant
