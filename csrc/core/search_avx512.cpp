#include "core/search.inl"
#include "core/vec_avx512.h"

namespace phiquant {

const SearchKernels search_avx512 = Search<Avx512>::table;

}  // namespace phiquant
