#include "core/hadamard_simd.inl"
#include "core/vec_avx2.h"

namespace phiquant {

const HadamardKernels hadamard_avx2 = HadamardLevel<Avx2>::table;

}  // namespace phiquant
