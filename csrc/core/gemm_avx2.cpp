#include "core/gemm_simd.inl"
#include "core/int_avx2.h"

namespace phiquant {

const GemmKernels gemm_avx2 = Products<IntAvx2>::table;

}  // namespace phiquant
