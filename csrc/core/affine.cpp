#include "core/affine.h"

#include "core/cpu.h"

namespace phiquant {

const AffineKernels& affine_kernels() {
#ifdef PHIQUANT_X86
  switch (cpu_level()) {
    case Level::avx512:
      return affine_avx512;
    case Level::avx2:
      return affine_avx2;
    case Level::scalar:
      break;
  }
#endif
  return affine_ref;
}

}  // namespace phiquant
