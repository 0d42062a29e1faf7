#include "core/two_level_search.inl"
#include "core/vec_avx512.h"

namespace phiquant {

const TwoLevelSearchKernels two_level_search_avx512 = TwoLevelSearch<Avx512>::table;

}  // namespace phiquant
