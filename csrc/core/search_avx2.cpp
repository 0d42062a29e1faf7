#include "core/search.inl"
#include "core/vec_avx2.h"

namespace phiquant {

const SearchKernels search_avx2 = Search<Avx2>::table;

}  // namespace phiquant
