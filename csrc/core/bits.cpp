#include "core/bits.h"

#include "core/cpu.h"

namespace phiquant {

const BitKernels& bit_kernels() {
#ifdef PHIQUANT_X86
  return by_level(bits_ref, bits_avx2, bits_avx512);
#else
  return bits_ref;
#endif
}

}  // namespace phiquant
