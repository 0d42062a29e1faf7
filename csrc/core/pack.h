// Codes of the safetensors formats as words. Those of GGUF: pack_gguf.h.
#pragma once

#include <cstdint>

namespace phiquant {

// compressed-tensors: eight 4-bit codes in an int32, value j of the eight in bits 4j, each stored as
// code + 8. codes [rows * cols], cols a multiple of 8; out [rows * cols / 8].
void pack_int32(const int8_t* codes, int64_t words, uint32_t* out);

}  // namespace phiquant
