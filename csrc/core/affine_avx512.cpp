#include "core/affine_simd.inl"
#include "core/vec_avx512.h"

namespace phiquant {

const AffineKernels affine_avx512 = Affine<Avx512>::table;

}  // namespace phiquant
