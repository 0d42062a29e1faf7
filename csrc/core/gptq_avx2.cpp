#include "core/gptq_simd.inl"
#include "core/vec_avx2.h"

namespace phiquant {

const GptqKernels gptq_avx2 = Gptq<Avx2>::table;

}  // namespace phiquant
