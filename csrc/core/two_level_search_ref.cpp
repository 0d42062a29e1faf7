// With lanes of one float: also what runs at level `scalar`.
#include "core/scalar_lanes.h"
#include "core/two_level_search.inl"

namespace phiquant {

const TwoLevelSearchKernels two_level_search_ref = TwoLevelSearch<Scalar>::table;

}  // namespace phiquant
