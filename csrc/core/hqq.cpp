#include "core/hqq.h"

#include "core/cpu.h"

namespace phiquant {

const HqqKernels& hqq_kernels() {
#ifdef PHIQUANT_X86
  return by_level(hqq_ref, hqq_avx2, hqq_avx512);
#else
  return hqq_ref;
#endif
}

}  // namespace phiquant
