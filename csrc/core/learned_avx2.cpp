#include "core/learned.inl"
#include "core/vec_avx2.h"

namespace phiquant {

const LearnedKernels learned_avx2 = Learned<Avx2>::table;

}  // namespace phiquant
