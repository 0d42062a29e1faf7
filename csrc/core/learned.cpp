#include "core/learned.h"

#include "core/cpu.h"

namespace phiquant {

const LearnedKernels& learned_kernels() {
#ifdef PHIQUANT_X86
  return by_level(learned_ref, learned_avx2, learned_avx512);
#else
  return learned_ref;
#endif
}

}  // namespace phiquant
