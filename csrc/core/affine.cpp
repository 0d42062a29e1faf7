#include "core/affine.h"

#include "core/cpu.h"

namespace phiquant {

const AffineKernels& affine_kernels() {
#ifdef PHIQUANT_X86
  return by_level(affine_ref, affine_avx2, affine_avx512);
#else
  return affine_ref;
#endif
}

}  // namespace phiquant
