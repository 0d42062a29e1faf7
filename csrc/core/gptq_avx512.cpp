#include "core/gptq_simd.inl"
#include "core/vec_avx512.h"

namespace phiquant {

const GptqKernels gptq_avx512 = Gptq<Avx512>::table;

}  // namespace phiquant
