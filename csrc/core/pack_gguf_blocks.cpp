// Blocks of 32 values (NVFP4: 64). Four-bit codes: byte j holds value j in its low half, value j + 16 in its high half.
#include "core/pack_gguf.h"
#include "core/pack_gguf.inl"

namespace phiquant {
namespace {

// The fifth bits: bit j of 32 is bit 4 of code j.
uint32_t fifth_bits(In codes, uint8_t flip) {
  uint32_t bits = 0;
  for (int group = 0; group < 4; ++group) {
    uint64_t eight;
    std::memcpy(&eight, codes + 8 * group, 8);
    // Bit 4 of eight bytes into eight neighbouring bits: the product adds byte i's bit at place 56 + i.
    const uint64_t fifths = eight >> 4 & 0x0101010101010101ULL;
    bits |= static_cast<uint32_t>(fifths * 0x0102040810204080ULL >> 56) << 8 * group;
  }
  return flip != 0 ? ~bits : bits;
}

// d, then m where kMinimum, then the fifth bits where kFive, then the halves.
template <bool kMinimum, bool kFive>
void pack_halves(const GgufParts& parts, uint8_t flip, int64_t blocks, uint8_t* out) {
  constexpr int kHead = 2 + (kMinimum ? 2 : 0);
  constexpr int kBytes = kHead + (kFive ? 4 : 0) + 16;
  for (int64_t b = 0; b < blocks; ++b, out += kBytes) {
    const uint8_t* codes = parts.codes + 32 * b;
    put(out, parts.d[b]);
    if constexpr (kMinimum) put(out + 2, parts.m[b]);
    if constexpr (kFive) {
      const uint32_t bits = fifth_bits(codes, flip);
      std::memcpy(out + kHead, &bits, 4);
      halves<16>(codes, 0, out + kHead + 4);
    } else {
      halves<16>(codes, flip, out + kHead);
    }
  }
}

}  // namespace

void pack_q4_0(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  pack_halves<false, false>(parts, 8, blocks, out);
}
void pack_q4_1(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  pack_halves<true, false>(parts, 0, blocks, out);
}
void pack_q5_0(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  pack_halves<false, true>(parts, 1, blocks, out);
}
void pack_q5_1(const GgufParts& parts, int64_t blocks, uint8_t* out) { pack_halves<true, true>(parts, 0, blocks, out); }
void pack_iq4_nl(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  pack_halves<false, false>(parts, 0, blocks, out);
}

void pack_q8_0(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 34) {
    put(out, parts.d[b]);
    std::memcpy(out + 2, parts.codes + 32 * b, 32);
  }
}

void pack_mxfp4(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 17) {
    out[0] = parts.scales[b];
    halves<16>(parts.codes + 32 * b, 0, out + 1);
  }
}

void pack_nvfp4(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 36) {
    std::memcpy(out, parts.scales + 4 * b, 4);
    for (int sub = 0; sub < 4; ++sub) halves<8>(parts.codes + 64 * b + 16 * sub, 0, out + 4 + 8 * sub);
  }
}

}  // namespace phiquant
