#include "core/kmeans_vectors_simd.inl"
#include "core/vec_avx512.h"

namespace phiquant {

const VectorKernels vectors_avx512 = VectorLevels<Avx512>::table;

}  // namespace phiquant
