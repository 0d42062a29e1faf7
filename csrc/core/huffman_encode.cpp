#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "core/huffman.h"
#include "core/huffman_code.h"

namespace phiquant {
namespace {

// One of the sorted lists of package-merge: a symbol, or a package of two items of the list before.
struct Item {
  uint64_t weight;
  bool is_symbol;
};

std::vector<Item> packages_and_symbols(const std::vector<Item>& before, const std::vector<Item>& symbols) {
  std::vector<Item> packages;
  for (size_t i = 0; i + 1 < before.size(); i += 2)
    packages.push_back({before[i].weight + before[i + 1].weight, false});
  std::vector<Item> merged(symbols.size() + packages.size());
  std::merge(symbols.begin(), symbols.end(), packages.begin(), packages.end(), merged.begin(),
             [](const Item& a, const Item& b) { return a.weight < b.weight; });
  return merged;
}

}  // namespace

PerSymbol<uint8_t> huffman_lengths(const PerSymbol<uint64_t>& counts) {
  PerSymbol<uint8_t> lengths{};
  std::vector<size_t> order;
  for (size_t s = 0; s < 256; ++s) {
    if (counts[s] > 0) order.push_back(s);
  }
  if (order.empty()) return lengths;
  if (order.size() == 1) {
    lengths[order[0]] = lengths[order[0] ^ 1] = 1;
    return lengths;
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return counts[a] < counts[b]; });
  std::vector<Item> symbols;
  for (const size_t s : order) symbols.push_back({counts[s], true});
  std::vector<std::vector<Item>> lists = {symbols};
  while (lists.size() < kHuffmanBits) lists.push_back(packages_and_symbols(lists.back(), symbols));
  // The cheapest 2n - 2 items of the last list; what they contain of each list before is a prefix of it. Each
  // time a symbol is among them its code grows by one bit.
  size_t taken = 2 * order.size() - 2;
  for (auto list = lists.rbegin(); list != lists.rend(); ++list) {
    const auto is_symbol = [](const Item& item) { return item.is_symbol; };
    const auto end = list->begin() + static_cast<std::ptrdiff_t>(taken);
    const auto n = static_cast<size_t>(std::count_if(list->begin(), end, is_symbol));
    for (size_t i = 0; i < n; ++i) ++lengths[order[i]];
    taken = 2 * (taken - n);
  }
  return lengths;
}

HuffmanWriter::HuffmanWriter(int64_t count)
    : count_(count), chunks_(huffman_chunks(count)), streams_(count < kHuffmanSmall ? 1 : kHuffmanStreams) {
  histograms_.resize(static_cast<size_t>(chunks_ * streams_));
}

void HuffmanWriter::count_chunk(const uint8_t* symbols, int64_t chunk) {
  for (int64_t stream = 0; stream < streams_; ++stream) {
    const Segment segment = huffman_segment(count_, chunk, stream, streams_);
    // Four tables: a run of one symbol would wait for its own counter each time.
    std::array<std::array<uint32_t, 256>, 4> tables{};
    int64_t i = segment.begin;
    for (; i + 4 <= segment.end; i += 4) {
      for (size_t j = 0; j < 4; ++j) ++tables[j][symbols[i + static_cast<int64_t>(j)]];
    }
    for (; i < segment.end; ++i) ++tables[0][symbols[i]];
    auto& histogram = histograms_[static_cast<size_t>(chunk * streams_ + stream)];
    for (size_t s = 0; s < 256; ++s) histogram[s] = tables[0][s] + tables[1][s] + tables[2][s] + tables[3][s];
  }
}

size_t HuffmanWriter::plan() {
  PerSymbol<uint64_t> counts{};
  for (const auto& histogram : histograms_) {
    for (size_t s = 0; s < 256; ++s) counts[s] += histogram[s];
  }
  lengths_ = huffman_lengths(counts);
  first_ = last_ = 0;
  size_t offset = kHuffmanHeader;
  if (count_ > 0) {
    while (lengths_[first_] == 0) ++first_;
    last_ = 255;
    while (lengths_[last_] == 0) --last_;
    offset += (static_cast<size_t>(last_ - first_) + 2) / 2 + 4 * histograms_.size();
  }
  offsets_.clear();
  for (const auto& histogram : histograms_) {
    uint64_t bits = 0;
    for (size_t s = 0; s < 256; ++s) bits += uint64_t{histogram[s]} * lengths_[s];
    const uint64_t bytes = (bits + 7) / 8;
    if (bytes > std::numeric_limits<uint32_t>::max()) throw std::length_error("a Huffman stream is over 4 GiB");
    offsets_.push_back(offset);
    offset += bytes;
  }
  offsets_.push_back(offset);
  return offset;
}

void HuffmanWriter::write_header(uint8_t* out) const {
  std::memcpy(out, &count_, 8);
  out[8] = first_;
  out[9] = last_;
  out[10] = static_cast<uint8_t>(count_ > 0 ? streams_ : 0);
  out[11] = 0;
  if (count_ == 0) return;
  uint8_t* nibbles = out + kHuffmanHeader;
  const size_t symbols = static_cast<size_t>(last_ - first_) + 1;
  for (size_t i = 0; i < symbols; i += 2) {
    const int high = i + 1 < symbols ? lengths_[first_ + i + 1] : 0;
    nibbles[i / 2] = static_cast<uint8_t>(lengths_[first_ + i] | high << 4);
  }
  uint8_t* directory = nibbles + (symbols + 1) / 2;
  for (size_t i = 0; i + 1 < offsets_.size(); ++i) {
    const auto bytes = static_cast<uint32_t>(offsets_[i + 1] - offsets_[i]);
    std::memcpy(directory + 4 * i, &bytes, 4);
  }
}

void HuffmanWriter::encode_chunk(const uint8_t* symbols, int64_t chunk, uint8_t* out) const {
  const PerSymbol<uint16_t> codes = huffman_codes(lengths_);
  for (int64_t stream = 0; stream < streams_; ++stream) {
    const Segment segment = huffman_segment(count_, chunk, stream, streams_);
    const auto index = static_cast<size_t>(chunk * streams_ + stream);
    uint8_t* to = out + offsets_[index];
    uint8_t* const end = out + offsets_[index + 1];
    uint64_t buffer = 0;
    int bits = 0;
    for (int64_t i = segment.begin; i < segment.end; ++i) {
      buffer |= uint64_t{codes[symbols[i]]} << bits;
      bits += lengths_[symbols[i]];
      if (bits >= 32) {  // 31 + 12 bits fit
        std::memcpy(to, &buffer, 4);
        to += 4;
        buffer >>= 32;
        bits -= 32;
      }
    }
    std::memcpy(to, &buffer, static_cast<size_t>(end - to));
  }
}

}  // namespace phiquant
