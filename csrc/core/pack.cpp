#include "core/pack.h"

#include <cstring>

namespace phiquant {

void pack_int32(const int8_t* codes, int64_t words, uint32_t* out) {
  for (int64_t w = 0; w < words; ++w) {
    // Gather the eight low nibbles of a 64-bit word into 32 bits, two, four, then eight at a time.
    uint64_t v;
    std::memcpy(&v, codes + 8 * w, 8);
    v &= 0x0f0f0f0f0f0f0f0fULL;
    v = (v | v >> 4) & 0x00ff00ff00ff00ffULL;
    v = (v | v >> 8) & 0x0000ffff0000ffffULL;
    v = (v | v >> 16) & 0xffffffffULL;
    out[w] = static_cast<uint32_t>(v) ^ 0x88888888u;
  }
}

}  // namespace phiquant
