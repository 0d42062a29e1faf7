#include "core/affine_simd.inl"
#include "core/vec_avx2.h"

namespace phiquant {

const AffineKernels affine_avx2 = Affine<Avx2>::table;

}  // namespace phiquant
