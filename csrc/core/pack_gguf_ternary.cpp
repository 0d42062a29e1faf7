// Codes -1, 0, 1 in super-blocks of 256 with one scale: in two bits each, or five to a byte.
#include "core/pack_gguf.h"
#include "core/pack_gguf.inl"

namespace phiquant {
namespace {

// kCount bytes: byte m holds the kTrits codes m, m + kCount, ... as digits of base 3, the first the highest, as a
// fraction of 256: its decoder multiplies by 3 and reads what is carried out of the byte.
template <int kCount, int kTrits>
void trits(In codes, Out out) {
  for (int m = 0; m < kCount; ++m) {
    uint16_t value = 0;
    for (int n = 0; n < 5; ++n)
      value = static_cast<uint16_t>(3 * value + (n < kTrits ? byte(codes[kCount * n + m] + 1) : 0));
    out[m] = byte((256 * value + 242) / 243);  // rounded up; below 2^16
  }
}

}  // namespace

void pack_tq1_0(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 54) {
    const uint8_t* codes = parts.codes + 256 * b;
    trits<32, 5>(codes, out);
    trits<16, 5>(codes + 160, out + 32);
    trits<4, 4>(codes + 240, out + 48);
    put(out + 52, parts.d[b]);
  }
}

void pack_tq2_0(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 66) {
    alignas(64) uint8_t codes[256];
    for (int i = 0; i < 256; ++i) codes[i] = byte(parts.codes[256 * b + i] + 1);
    crumbs(codes, out);
    put(out + 64, parts.d[b]);
  }
}

}  // namespace phiquant
