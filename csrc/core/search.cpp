#include "core/search.h"

#include "core/cpu.h"

namespace phiquant {

const SearchKernels& search_kernels() {
#ifdef PHIQUANT_X86
  return by_level(search_ref, search_avx2, search_avx512);
#else
  return search_ref;
#endif
}

}  // namespace phiquant
