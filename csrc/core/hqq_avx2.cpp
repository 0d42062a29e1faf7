#include "core/hqq.inl"
#include "core/vec_avx2.h"

namespace phiquant {

const HqqKernels hqq_avx2 = Hqq<Avx2>::table;

}  // namespace phiquant
