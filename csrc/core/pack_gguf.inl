// Patterns of bits that several block types share. All loops have fixed counts over bytes: the compiler makes
// vectors of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace phiquant {
namespace {

using Out = uint8_t* __restrict__;
using In = const uint8_t* __restrict__;

inline uint8_t byte(int value) { return static_cast<uint8_t>(value); }

// fp16 bits, little endian, at any address.
inline void put(uint8_t* at, uint16_t bits) { std::memcpy(at, &bits, sizeof bits); }

// kCount bytes: byte j holds code j in its low half and code j + kCount in its high half. `flip` is xored into
// each half: 8 turns -8..7 into 0..15.
template <int kCount>
inline void halves(In codes, uint8_t flip, Out out) {
  for (int j = 0; j < kCount; ++j) {
    out[j] = byte(((codes[j] & 15) | (codes[j + kCount] & 15) << 4) ^ (flip | flip << 4));
  }
}

// 64 bytes of two bits each: byte 32h + l holds codes 128h + l, + 32, + 64, + 96, lowest first.
inline void crumbs(In codes, Out out) {
  for (int h = 0; h < 2; ++h) {
    for (int l = 0; l < 32; ++l) {
      In c = codes + 128 * h + l;
      out[32 * h + l] = byte((c[0] & 3) | (c[32] & 3) << 2 | (c[64] & 3) << 4 | (c[96] & 3) << 6);
    }
  }
}

// 128 bytes of four bits each: chunk c of 32 bytes holds codes 64c + l in low halves, 64c + 32 + l in high ones.
inline void chunks(In codes, Out out) {
  for (int c = 0; c < 4; ++c) halves<32>(codes + 64 * c, 0, out + 32 * c);
}

// 32 bytes of one bit of each of 256 codes: bit k of byte l is `bit` of code 32k + l.
inline void bit_planes(In codes, int bit, Out out) {
  for (int l = 0; l < 32; ++l) {
    int mask = 0;
    for (int k = 0; k < 8; ++k) mask |= (codes[32 * k + l] >> bit & 1) << k;
    out[l] = byte(mask);
  }
}

}  // namespace
}  // namespace phiquant
