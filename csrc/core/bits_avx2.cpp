#include "core/bits.inl"

namespace phiquant {

const BitKernels bits_avx2 = table;

}  // namespace phiquant
