#include <cstring>
#include <stdexcept>
#include <string>

#include "core/huffman.h"
#include "core/huffman_code.h"

namespace phiquant {
namespace {

constexpr size_t kEntries = size_t{1} << kHuffmanBits;
constexpr int kMost = 6;  // symbols in one entry of the table

// What is left to do of one stream. `buffer` holds the next bits, at least `bits` of them, lowest first; bits
// above those are either 0 or what `in` says next, so it does no harm to read them again.
struct Stream {
  const uint8_t* in;
  const uint8_t* in_end;
  uint8_t* out;
  uint8_t* out_end;
  uint64_t buffer = 0;
  int bits = 0;
};

constexpr int kLookups = 56 / kHuffmanBits;  // between two refills, which leave at least 56 bits

// Rounds of kLookups lookups that can do no harm: a round reads at most 8 bytes ahead and moves at most 7, and
// stores 8 bytes at a time but moves at most kMost.
int64_t safe_rounds(const Stream& s) {
  const int64_t in = (s.in_end - s.in - 1) / 7;
  const int64_t out = (s.out_end - s.out - 2) / (kLookups * kMost);
  return std::min(in, out);
}

// Decodes S streams side by side, as far as needs no care.
template <int S>
void decode_fast(const uint64_t* table, Stream* streams) {
  for (;;) {
    int64_t rounds = safe_rounds(streams[0]);
    for (int s = 1; s < S; ++s) rounds = std::min(rounds, safe_rounds(streams[s]));
    if (rounds <= 0) return;
    Stream state[S];
    for (int s = 0; s < S; ++s) state[s] = streams[s];
    for (int64_t round = 0; round < rounds; ++round) {
      for (int s = 0; s < S; ++s) {
        uint64_t next;
        std::memcpy(&next, state[s].in, 8);
        state[s].buffer |= next << state[s].bits;
        state[s].in += (63 - state[s].bits) >> 3;
        state[s].bits |= 56;
      }
      for (int i = 0; i < kLookups; ++i) {
        for (int s = 0; s < S; ++s) {
          const uint64_t entry = table[state[s].buffer & (kEntries - 1)];
          std::memcpy(state[s].out, &entry, 8);
          const int used = static_cast<int>(entry >> 56);
          state[s].out += entry >> 48 & 0xff;
          state[s].buffer >>= used;
          state[s].bits -= used;
        }
      }
    }
    for (int s = 0; s < S; ++s) streams[s] = state[s];
  }
}

// Decodes the rest symbol by symbol. False unless the bytes end with the last symbol and zero bits.
bool decode_rest(const uint64_t* table, const PerSymbol<uint8_t>& lengths, Stream s) {
  while (s.out < s.out_end) {
    for (; s.bits <= 56 && s.in < s.in_end; s.bits += 8) s.buffer |= uint64_t{*s.in++} << s.bits;
    const auto symbol = static_cast<uint8_t>(table[s.buffer & (kEntries - 1)]);
    const int length = lengths[symbol];
    if (length > s.bits) return false;
    *s.out++ = symbol;
    s.buffer >>= length;
    s.bits -= length;
  }
  const uint64_t padding = s.buffer & ((uint64_t{1} << s.bits) - 1);
  return s.in == s.in_end && s.bits < 8 && padding == 0;
}

[[noreturn]] void damaged(const std::string& what) {
  throw std::invalid_argument("the Huffman data is damaged: " + what);
}

}  // namespace

HuffmanReader::HuffmanReader(const uint8_t* data, size_t size) : data_(data) {
  if (size < kHuffmanHeader) damaged(std::to_string(size) + " bytes do not hold its header");
  uint64_t count;
  std::memcpy(&count, data, 8);
  const int first = data[8], last = data[9];
  streams_ = data[10];
  if (count == 0 && size == kHuffmanHeader && first == 0 && last == 0 && streams_ == 0 && data[11] == 0) return;
  if (first > last || (streams_ != 1 && streams_ != kHuffmanStreams) || data[11] != 0) damaged("its header");
  // A symbol takes a bit or more. This bounds everything that is computed from the count below.
  if (count == 0 || count / 8 > size) damaged("it is too short for its " + std::to_string(count) + " symbols");
  count_ = static_cast<int64_t>(count);
  chunks_ = huffman_chunks(count_);

  const auto symbols = static_cast<size_t>(last - first + 1);
  const size_t directory = kHuffmanHeader + (symbols + 1) / 2;
  const auto entries = static_cast<size_t>(chunks_ * streams_);
  if (size < directory || (size - directory) / 4 < entries) damaged("its table or directory is cut off");
  uint32_t shares = 0;  // of the 2^kHuffmanBits codes
  int shortest = kHuffmanBits, longest = 0;
  for (size_t i = 0; i < symbols + symbols % 2; ++i) {
    const int length = data[kHuffmanHeader + i / 2] >> (i % 2 * 4) & 15;
    if (length == 0) continue;
    if (i == symbols || length > kHuffmanBits) damaged("a code length of " + std::to_string(length));
    lengths_[static_cast<size_t>(first) + i] = static_cast<uint8_t>(length);
    shares += 1u << (kHuffmanBits - length);
    shortest = std::min(shortest, length);
    longest = std::max(longest, length);
  }
  if (shares != kEntries) damaged("its code lengths make no complete code");

  size_t offset = directory + 4 * entries;
  for (size_t i = 0; i < entries; ++i) {
    uint32_t bytes;
    std::memcpy(&bytes, data + directory + 4 * i, 4);
    const auto [begin, end] =
        huffman_segment(count_, static_cast<int64_t>(i) / streams_, static_cast<int64_t>(i) % streams_, streams_);
    const int64_t n = end - begin;
    if (bytes < (n * shortest + 7) / 8 || bytes > (n * longest + 7) / 8) damaged("the size of a stream");
    if (bytes > size - offset) damaged("its streams are cut off");
    offsets_.push_back(offset);
    offset += bytes;
  }
  if (offset != size) damaged(std::to_string(size - offset) + " bytes follow its streams");
  offsets_.push_back(offset);
  build_table();
}

void HuffmanReader::build_table() {
  const PerSymbol<uint16_t> codes = huffman_codes(lengths_);
  std::vector<uint8_t> next(kEntries);  // the symbol that the lowest bits spell
  for (size_t s = 0; s < 256; ++s) {
    if (lengths_[s] == 0) continue;
    for (size_t i = codes[s]; i < kEntries; i += size_t{1} << lengths_[s]) next[i] = static_cast<uint8_t>(s);
  }
  table_.resize(kEntries);
  for (size_t i = 0; i < kEntries; ++i) {
    uint64_t entry = 0;
    int used = 0;
    uint64_t n = 0;
    while (n < kMost) {
      const uint8_t symbol = next[i >> used];
      if (used + lengths_[symbol] > kHuffmanBits) break;  // its code goes on beyond these bits
      entry |= uint64_t{symbol} << (8 * n++);
      used += lengths_[symbol];
    }
    table_[i] = entry | n << 48 | static_cast<uint64_t>(used) << 56;
  }
}

bool HuffmanReader::decode_chunk(int64_t chunk, uint8_t* symbols) const {
  Stream streams[kHuffmanStreams];
  for (int64_t s = 0; s < streams_; ++s) {
    const auto i = static_cast<size_t>(chunk * streams_ + s);
    const Segment segment = huffman_segment(count_, chunk, s, streams_);
    streams[s] = {data_ + offsets_[i], data_ + offsets_[i + 1], symbols + segment.begin, symbols + segment.end};
  }
  if (streams_ == kHuffmanStreams) decode_fast<kHuffmanStreams>(table_.data(), streams);
  for (int64_t s = 0; s < streams_; ++s) {
    decode_fast<1>(table_.data(), streams + s);
    if (!decode_rest(table_.data(), lengths_, streams[s])) return false;
  }
  return true;
}

}  // namespace phiquant
