#include "core/pack.h"

#include <cstring>

namespace phiquant {
namespace {

// Values j and j + 16 share byte j. `flip` is xored into each nibble: 8 turns -8..7 into 0..15.
void pack_halves(const uint8_t* codes, uint8_t flip, uint8_t* qs) {
  for (int j = 0; j < 16; ++j) {
    qs[j] = static_cast<uint8_t>(((codes[j] & 15) | (codes[j + 16] & 15) << 4) ^ (flip | flip << 4));
  }
}

}  // namespace

void pack_q4_0(const int8_t* codes, const uint16_t* d, int64_t blocks, BlockQ4_0* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    out[b].d = d[b];
    pack_halves(reinterpret_cast<const uint8_t*>(codes) + 32 * b, 8, out[b].qs);
  }
}

void pack_q4_1(const uint8_t* codes, const uint16_t* d, const uint16_t* m, int64_t blocks, BlockQ4_1* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    out[b].d = d[b];
    out[b].m = m[b];
    pack_halves(codes + 32 * b, 0, out[b].qs);
  }
}

void pack_q8_0(const int8_t* codes, const uint16_t* d, int64_t blocks, BlockQ8_0* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    out[b].d = d[b];
    std::memcpy(out[b].qs, codes + 32 * b, 32);
  }
}

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
