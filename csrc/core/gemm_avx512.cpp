#include "core/gemm_simd.inl"
#include "core/int_avx512.h"

namespace phiquant {

const GemmKernels gemm_avx512 = Products<IntAvx512>::table;

}  // namespace phiquant
