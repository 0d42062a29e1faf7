// Canonical Huffman codes of byte symbols, as a file holds them: written once, decoded fast, never trusted.
//
// Symbols are cut into chunks of kHuffmanChunk, which threads share, and a chunk into 1 or 4 streams of
// consecutive symbols, which one thread decodes side by side: a processor then works on four chains of
// dependent shifts at once. All numbers are little endian:
//
//   u64  count              symbols in all
//   u8   first, last        the alphabet; symbols outside it do not occur
//   u8   streams            in each chunk: 1 or 4
//   u8   0
//   u4   length[first..last]  of each symbol's code, 0: none; low half of a byte first
//   u32  bytes[chunk][stream]
//   the streams, each a whole number of bytes
//
// A stream of n symbols is the codes one after the other from the lowest bit of the first byte up, then
// zero bits to the end of the byte. Codes are canonical: shorter first, equal lengths in the order of
// their symbols; the first bit of a code is its highest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace phiquant {

// The longest code. The table of the decoder has 2^12 entries; limiting lengths costs less than 1 % of the
// file unless the rarest symbols are rarer than 1 in 4096.
constexpr int kHuffmanBits = 12;
constexpr int64_t kHuffmanChunk = 1 << 17;

template <class T>
using PerSymbol = std::array<T, 256>;

// The lengths, at most kHuffmanBits, that make sum(count * length) least: package-merge (Larmore and
// Hirschberg 1990). Symbols that do not occur get 0. The code is complete: a lone symbol shares its one bit
// with a neighbour that never comes.
PerSymbol<uint8_t> huffman_lengths(const PerSymbol<uint64_t>& counts);

// Writes `count` symbols. Chunks may be counted and encoded in any order, by several threads.
class HuffmanWriter {
 public:
  explicit HuffmanWriter(int64_t count);
  int64_t chunks() const { return chunks_; }
  // First, for every chunk: count its symbols.
  void count_chunk(const uint8_t* symbols, int64_t chunk);
  // Then once: choose the code. Returns the size of the result in bytes.
  // Throws std::length_error if a stream would not fit the format (never for chunks of kHuffmanChunk).
  size_t plan();
  // Then write the header and, for every chunk, its streams. `out` has as many bytes as plan() said.
  void write_header(uint8_t* out) const;
  void encode_chunk(const uint8_t* symbols, int64_t chunk, uint8_t* out) const;

 private:
  int64_t count_, chunks_, streams_;
  std::vector<std::array<uint32_t, 256>> histograms_;  // [chunk][stream]
  std::vector<size_t> offsets_;                        // [chunk][stream], and the end
  PerSymbol<uint8_t> lengths_{};
  uint8_t first_ = 0, last_ = 0;
};

// Reads what HuffmanWriter wrote, or refuses: whatever the bytes are, it reads no byte outside
// [data, data + size) and writes no symbol outside its chunk.
class HuffmanReader {
 public:
  // Throws std::invalid_argument, saying what is wrong, unless header, table and directory are consistent.
  // Then count() <= 8 * size, so memory for the symbols may be taken.
  HuffmanReader(const uint8_t* data, size_t size);
  int64_t count() const { return count_; }
  int64_t chunks() const { return chunks_; }
  // Decodes chunk i into symbols[i * kHuffmanChunk ...). False unless its streams hold exactly its symbols.
  bool decode_chunk(int64_t chunk, uint8_t* symbols) const;

 private:
  void build_table();

  int64_t count_ = 0, chunks_ = 0, streams_ = 0;
  const uint8_t* data_;
  std::vector<size_t> offsets_;  // [chunk][stream], and the end: checked
  PerSymbol<uint8_t> lengths_{};
  std::vector<uint64_t> table_;  // [2^kHuffmanBits]: up to six symbols, their number, their bits; a byte each
};

}  // namespace phiquant
