#include "core/gemm_simd.inl"
#include "core/int_avx512.h"

namespace phiquant {

const GemmKernels gemm_avx512vnni = Products<IntAvx512Vnni>::table;

}  // namespace phiquant
