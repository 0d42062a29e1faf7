#include "core/pack_dense.h"

#include <algorithm>
#include <cstring>

namespace phiquant {
namespace {

constexpr uint64_t kOnes = 0x0101010101010101ULL;
constexpr int64_t kTile = 64;  // rows and columns transposed at once: both sides stay in the first cache

// Eight codes, one per byte, to Bits bits each in the low 8 * Bits bits.
template <int Bits>
uint64_t gather(uint64_t v) {
  if constexpr (Bits == 8) {
    return v;
  } else {
    v = (v | v >> (8 - Bits)) & ((1ULL << 2 * Bits) - 1) * 0x0001000100010001ULL;
    v = (v | v >> (16 - 2 * Bits)) & ((1ULL << 4 * Bits) - 1) * 0x0000000100000001ULL;
    return (v | v >> (32 - 4 * Bits)) & ((1ULL << 8 * Bits) - 1);
  }
}

template <int Bits>
void pack_row(const uint8_t* codes, int64_t cols, uint8_t add, uint8_t* out) {
  constexpr uint8_t mask = (1 << Bits) - 1;
  // Every byte is added to by itself: its highest bit apart, so that nothing carries into the next byte.
  const uint64_t low = kOnes * (mask & 0x7f), high = kOnes * (mask & 0x80), adds = kOnes * add;
  int64_t c = 0;
  for (; c + 8 <= cols; c += 8, out += Bits) {
    uint64_t v;
    std::memcpy(&v, codes + c, 8);
    const uint64_t packed = gather<Bits>((((v & low) + (adds & low)) ^ ((v ^ adds) & high)) & (low | high));
    std::memcpy(out, &packed, Bits);
  }
  uint64_t last = 0;
  for (int64_t j = 0; c + j < cols; ++j) {
    last |= static_cast<uint64_t>(static_cast<uint8_t>(codes[c + j] + add) & mask) << (Bits * j);
  }
  std::memcpy(out, &last, static_cast<size_t>(dense_bytes(cols - c, Bits)));
}

template <int Bits>
void pack_rows(const uint8_t* codes, int64_t rows, int64_t cols, uint8_t add, uint8_t* out) {
  for (int64_t r = 0; r < rows; ++r) pack_row<Bits>(codes + r * cols, cols, add, out + r * dense_bytes(cols, Bits));
}

// Element `at` of the flat array `out` and those after it; pack_row() writes whole bytes, so it takes those.
template <int Bits>
void pack_from(const uint8_t* codes, int64_t count, uint8_t add, int64_t at, uint8_t* out) {
  constexpr int64_t kPerByte = 8 / Bits;
  constexpr uint8_t mask = (1 << Bits) - 1;
  const auto put = [&](int64_t i) {
    const int64_t bit = (at + i) * Bits;
    out[bit >> 3] = static_cast<uint8_t>(out[bit >> 3] | ((codes[i] + add) & mask) << (bit & 7));
  };
  int64_t i = 0;
  for (; i < count && (at + i) % kPerByte != 0; ++i) put(i);
  const int64_t whole = (count - i) / kPerByte * kPerByte;
  pack_row<Bits>(codes + i, whole, add, out + (at + i) * Bits / 8);
  for (i += whole; i < count; ++i) put(i);
}

template <int Bits>
void pack_transposed(const uint8_t* codes, int64_t rows, int64_t cols, uint8_t add, int64_t first, int64_t width,
                     uint8_t* out) {
  uint8_t tile[kTile][kTile];
  for (int64_t r = 0; r < rows; r += kTile) {
    const int64_t height = std::min(kTile, rows - r);
    for (int64_t c = 0; c < cols; c += kTile) {
      const int64_t count = std::min(kTile, cols - c);
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < count; ++j) tile[j][i] = codes[(r + i) * cols + c + j];
      }
      for (int64_t j = 0; j < count; ++j) pack_from<Bits>(tile[j], height, add, (c + j) * width + first + r, out);
    }
  }
}

}  // namespace

void pack_dense(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint8_t add, uint8_t* out) {
  switch (bits) {
    case 1:
      return pack_rows<1>(codes, rows, cols, add, out);
    case 2:
      return pack_rows<2>(codes, rows, cols, add, out);
    case 4:
      return pack_rows<4>(codes, rows, cols, add, out);
    default:
      return pack_rows<8>(codes, rows, cols, add, out);
  }
}

void pack_columns(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint8_t add, int64_t first, int64_t width,
                  uint8_t* out) {
  switch (bits) {
    case 1:
      return pack_transposed<1>(codes, rows, cols, add, first, width, out);
    case 2:
      return pack_transposed<2>(codes, rows, cols, add, first, width, out);
    case 4:
      return pack_transposed<4>(codes, rows, cols, add, first, width, out);
    default:
      return pack_transposed<8>(codes, rows, cols, add, first, width, out);
  }
}

}  // namespace phiquant
