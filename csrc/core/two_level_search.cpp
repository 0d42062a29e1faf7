#include "core/two_level_search.h"

#include "core/cpu.h"

namespace phiquant {

const TwoLevelSearchKernels& two_level_search_kernels() {
#ifdef PHIQUANT_X86
  return by_level(two_level_search_ref, two_level_search_avx2, two_level_search_avx512);
#else
  return two_level_search_ref;
#endif
}

}  // namespace phiquant
