// A decoder of Huffman data written bit by bit from the words of core/huffman.h, sharing no code with it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

namespace phiquant {

using Bytes = std::vector<uint8_t>;

inline uint64_t little_endian(const Bytes& data, size_t at, size_t bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < bytes; ++i) value |= uint64_t{data.at(at + i)} << (8 * i);
  return value;
}

// The symbols that these bits spell, or nothing unless they end with the last symbol and zeros to the end of its byte.
inline std::optional<Bytes> spell(const Bytes& stream, size_t n, const std::map<std::pair<int, int>, uint8_t>& book) {
  Bytes symbols;
  size_t bit = 0;
  while (symbols.size() < n) {
    int length = 0, code = 0;
    do {
      if (bit == 8 * stream.size()) return std::nullopt;
      code = 2 * code + (stream[bit / 8] >> (bit % 8) & 1);
      ++bit;
      ++length;
    } while (!book.count({length, code}));
    symbols.push_back(book.at({length, code}));
  }
  if ((bit + 7) / 8 != stream.size()) return std::nullopt;
  for (; bit < 8 * stream.size(); ++bit) {
    if (stream[bit / 8] >> (bit % 8) & 1) return std::nullopt;
  }
  return symbols;
}

// The symbols, or nothing if the data breaks any rule of the format.
inline std::optional<Bytes> decode_slowly(const Bytes& data) {
  if (data.size() < 12 || data[11] != 0) return std::nullopt;
  const uint64_t count = little_endian(data, 0, 8);
  const size_t first = data[8], last = data[9], streams = data[10];
  if (count == 0) return data == Bytes(12) ? std::optional<Bytes>(Bytes()) : std::nullopt;
  if (first > last || (streams != 1 && streams != 4) || count / 8 > data.size()) return std::nullopt;
  const size_t alphabet = last - first + 1;
  const size_t directory = 12 + (alphabet + 1) / 2;
  if (data.size() < directory) return std::nullopt;
  if (alphabet % 2 == 1 && data[directory - 1] >> 4 != 0) return std::nullopt;

  std::map<std::pair<int, int>, uint8_t> book;  // (length, code), the code's first bit highest
  int next = 0;
  for (int length = 1; length <= 15; ++length, next *= 2) {
    for (size_t i = 0; i < alphabet; ++i) {
      if ((data[12 + i / 2] >> (i % 2 * 4) & 15) != length) continue;
      if (length > 12) return std::nullopt;
      book[{length, next++}] = static_cast<uint8_t>(first + i);
    }
    if (next > 1 << length) return std::nullopt;  // more codes than there are
  }
  if (next != 1 << 16) return std::nullopt;  // fewer

  constexpr uint64_t kChunk = uint64_t{1} << 17;
  const uint64_t chunks = (count + kChunk - 1) / kChunk;
  if ((data.size() - directory) / 4 < chunks * streams) return std::nullopt;
  size_t at = directory + 4 * chunks * streams;
  Bytes symbols;
  for (size_t c = 0; c < chunks; ++c) {
    const size_t in_chunk = std::min(kChunk, count - c * kChunk);
    const size_t each = (in_chunk + streams - 1) / streams;
    for (size_t s = 0; s < streams; ++s) {
      const size_t n = std::min(each, in_chunk - std::min(in_chunk, s * each));
      const size_t bytes = little_endian(data, directory + 4 * (c * streams + s), 4);
      if (bytes > data.size() - at) return std::nullopt;
      const auto begin = data.begin() + static_cast<std::ptrdiff_t>(at);
      const auto part = spell(Bytes(begin, begin + static_cast<std::ptrdiff_t>(bytes)), n, book);
      if (!part) return std::nullopt;
      symbols.insert(symbols.end(), part->begin(), part->end());
      at += bytes;
    }
  }
  return at == data.size() ? std::optional<Bytes>(symbols) : std::nullopt;
}

}  // namespace phiquant
