#include "core/kmeans_vectors_simd.inl"
#include "core/vec_avx2.h"

namespace phiquant {

const VectorKernels vectors_avx2 = VectorLevels<Avx2>::table;

}  // namespace phiquant
