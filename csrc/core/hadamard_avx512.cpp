#include "core/hadamard_simd.inl"
#include "core/vec_avx512.h"

namespace phiquant {

const HadamardKernels hadamard_avx512 = HadamardLevel<Avx512>::table;

}  // namespace phiquant
