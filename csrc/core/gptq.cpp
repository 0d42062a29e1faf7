#include "core/gptq.h"

#include "core/cpu.h"

namespace phiquant {

const GptqKernels& gptq_kernels() {
#ifdef PHIQUANT_X86
  return by_level(gptq_ref, gptq_avx2, gptq_avx512);
#else
  return gptq_ref;
#endif
}

}  // namespace phiquant
