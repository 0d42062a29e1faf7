#include "core/hqq.inl"
#include "core/vec_avx512.h"

namespace phiquant {

const HqqKernels hqq_avx512 = Hqq<Avx512>::table;

}  // namespace phiquant
