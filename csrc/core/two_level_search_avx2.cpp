#include "core/two_level_search.inl"
#include "core/vec_avx2.h"

namespace phiquant {

const TwoLevelSearchKernels two_level_search_avx2 = TwoLevelSearch<Avx2>::table;

}  // namespace phiquant
