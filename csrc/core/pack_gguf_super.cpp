// K-quants and IQ4_XS: super-blocks of 256 values whose sub-scales are codes of 4, 6 or 8 bits.
#include "core/pack_gguf.h"
#include "core/pack_gguf.inl"

namespace phiquant {
namespace {

// Eight scales and eight minimums of six bits in twelve bytes: the first four of each whole in bytes 0..3 and
// 4..7, whose two upper bits are those of the last four; the low halves of these in bytes 8..11.
void six_bits(In s, In m, Out out) {
  for (int j = 0; j < 4; ++j) {
    out[j] = byte((s[j] & 63) | (s[j + 4] >> 4 & 3) << 6);
    out[j + 4] = byte((m[j] & 63) | (m[j + 4] >> 4 & 3) << 6);
    out[j + 8] = byte((s[j + 4] & 15) | (m[j + 4] & 15) << 4);
  }
}

}  // namespace

void pack_q2_k(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 84) {
    In s = parts.scales + 16 * b;
    In m = parts.minimums + 16 * b;
    for (int j = 0; j < 16; ++j) out[j] = byte((s[j] & 15) | (m[j] & 15) << 4);
    crumbs(parts.codes + 256 * b, out + 16);
    put(out + 80, parts.d[b]);
    put(out + 82, parts.m[b]);
  }
}

void pack_q3_k(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 110) {
    alignas(64) uint8_t codes[256];
    for (int i = 0; i < 256; ++i) codes[i] = byte(parts.codes[256 * b + i] + 4);
    bit_planes(codes, 2, out);
    crumbs(codes, out + 32);
    uint8_t s[16];
    for (int j = 0; j < 16; ++j) s[j] = byte(parts.scales[16 * b + j] + 32);
    for (int j = 0; j < 8; ++j) out[96 + j] = byte((s[j] & 15) | (s[j + 8] & 15) << 4);
    for (int j = 0; j < 4; ++j) {
      out[104 + j] =
          byte((s[j] >> 4 & 3) | (s[j + 4] >> 4 & 3) << 2 | (s[j + 8] >> 4 & 3) << 4 | (s[j + 12] >> 4 & 3) << 6);
    }
    put(out + 108, parts.d[b]);
  }
}

void pack_q4_k(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 144) {
    put(out, parts.d[b]);
    put(out + 2, parts.m[b]);
    six_bits(parts.scales + 8 * b, parts.minimums + 8 * b, out + 4);
    chunks(parts.codes + 256 * b, out + 16);
  }
}

void pack_q5_k(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 176) {
    put(out, parts.d[b]);
    put(out + 2, parts.m[b]);
    six_bits(parts.scales + 8 * b, parts.minimums + 8 * b, out + 4);
    bit_planes(parts.codes + 256 * b, 4, out + 16);
    chunks(parts.codes + 256 * b, out + 48);
  }
}

void pack_q6_k(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 210) {
    alignas(64) uint8_t codes[256], high[256];
    for (int i = 0; i < 256; ++i) {
      codes[i] = byte(parts.codes[256 * b + i] + 32);
      high[i] = codes[i] >> 4;
    }
    for (int h = 0; h < 2; ++h) halves<64>(codes + 128 * h, 0, out + 64 * h);
    crumbs(high, out + 128);
    std::memcpy(out + 192, parts.scales + 16 * b, 16);
    put(out + 208, parts.d[b]);
  }
}

void pack_iq4_xs(const GgufParts& parts, int64_t blocks, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, out += 136) {
    uint16_t high = 0;
    uint8_t low[8];
    for (int j = 0; j < 8; ++j) {
      const uint8_t s = byte(parts.scales[8 * b + j] + 32);
      low[j] = s & 15;
      high = static_cast<uint16_t>(high | (s >> 4 & 3) << 2 * j);
    }
    put(out, parts.d[b]);
    put(out + 2, high);
    for (int j = 0; j < 4; ++j) out[4 + j] = byte(low[2 * j] | low[2 * j + 1] << 4);
    for (int j = 0; j < 8; ++j) halves<16>(parts.codes + 256 * b + 32 * j, 0, out + 8 + 16 * j);
  }
}

}  // namespace phiquant
