#include "core/learned.inl"
#include "core/scalar_lanes.h"

namespace phiquant {

const LearnedKernels learned_ref = Learned<Scalar>::table;

}  // namespace phiquant
