#include "core/bits.inl"

namespace phiquant {

const BitKernels bits_ref = table;

}  // namespace phiquant
