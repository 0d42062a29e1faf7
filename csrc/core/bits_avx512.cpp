#include "core/bits.inl"

namespace phiquant {

const BitKernels bits_avx512 = table;

}  // namespace phiquant
