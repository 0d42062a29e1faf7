#include "core/hadamard.h"

#include "core/cpu.h"

namespace phiquant {

const HadamardKernels& hadamard_kernels() {
#ifdef PHIQUANT_X86
  return by_level(hadamard_ref, hadamard_avx2, hadamard_avx512);
#else
  return hadamard_ref;
#endif
}

}  // namespace phiquant
