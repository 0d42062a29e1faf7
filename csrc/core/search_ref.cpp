// The search with lanes of one float: also what runs at level `scalar`.
#include "core/scalar_lanes.h"
#include "core/search.inl"

namespace phiquant {

const SearchKernels search_ref = Search<Scalar>::table;

}  // namespace phiquant
