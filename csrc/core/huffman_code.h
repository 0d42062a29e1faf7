// What writer and reader of Huffman streams share: the canonical code of given lengths, and the cut into streams.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "core/huffman.h"

namespace phiquant {

static_assert(std::endian::native == std::endian::little, "streams are read eight bytes at a time");

constexpr size_t kHuffmanHeader = 12;
constexpr int64_t kHuffmanStreams = 4;
constexpr int64_t kHuffmanSmall = 4096;  // with fewer symbols, four streams would cost more bytes than they save time

// Codes with their first bit lowest, as streams hold them. Lengths must satisfy sum(2^-length) <= 1.
inline PerSymbol<uint16_t> huffman_codes(const PerSymbol<uint8_t>& lengths) {
  PerSymbol<uint16_t> codes{};
  uint32_t next = 0;
  for (int length = 1; length <= kHuffmanBits; ++length, next <<= 1) {
    for (size_t s = 0; s < 256; ++s) {
      if (lengths[s] != length) continue;
      uint32_t reversed = 0;
      for (int bit = 0; bit < length; ++bit) reversed |= (next >> bit & 1) << (length - 1 - bit);
      codes[s] = static_cast<uint16_t>(reversed);
      ++next;
    }
  }
  return codes;
}

inline int64_t huffman_chunks(int64_t count) { return count / kHuffmanChunk + (count % kHuffmanChunk != 0); }

// Symbols [begin, end) of one stream.
struct Segment {
  int64_t begin;
  int64_t end;
};

inline Segment huffman_segment(int64_t count, int64_t chunk, int64_t stream, int64_t streams) {
  const int64_t begin = chunk * kHuffmanChunk;
  const int64_t symbols = std::min(kHuffmanChunk, count - begin);
  const int64_t length = (symbols + streams - 1) / streams;
  return {begin + std::min(symbols, stream * length), begin + std::min(symbols, (stream + 1) * length)};
}

}  // namespace phiquant
