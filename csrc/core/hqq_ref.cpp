// The solver with lanes of one float: also what runs at level `scalar`.
#include "core/hqq.inl"
#include "core/scalar_lanes.h"

namespace phiquant {

const HqqKernels hqq_ref = Hqq<Scalar>::table;

}  // namespace phiquant
