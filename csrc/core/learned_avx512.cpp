#include "core/learned.inl"
#include "core/vec_avx512.h"

namespace phiquant {

const LearnedKernels learned_avx512 = Learned<Avx512>::table;

}  // namespace phiquant
