// Huffman coding of byte symbols: checks, allocation, chunks shared among threads. The format is in core/huffman.h.
//
// symbols: uint8, any shape. data: uint8 [bytes], as huffman_encode returns it. counts: int64 [256].
#include "core/huffman.h"

#include <atomic>

#include "ops/blocks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  m.def("huffman_lengths(Tensor counts) -> Tensor");
  m.def("huffman_encode(Tensor symbols) -> Tensor");
  m.def("huffman_decode(Tensor data, int count) -> Tensor");
}

namespace phiquant {
namespace {

void check_bytes(const Tensor& t, const char* name) {
  check(t.scalar_type() == ScalarType::Byte, std::string(name) + " must be uint8");
  check_contiguous(t, name);
}

template <class F>
void for_chunks(int64_t chunks, const F& f) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
  });
}

Tensor lengths_of(const Tensor& counts) {
  check(counts.scalar_type() == ScalarType::Long && counts.numel() == 256, "counts must be int64 [256]");
  check_contiguous(counts, "counts");
  const auto* in = static_cast<const int64_t*>(counts.const_data_ptr());
  PerSymbol<uint64_t> histogram;
  for (size_t s = 0; s < 256; ++s) {
    check(in[s] >= 0 && in[s] < int64_t{1} << 48, "counts must be from 0 to 2^48");
    histogram[s] = static_cast<uint64_t>(in[s]);
  }
  const PerSymbol<uint8_t> found = huffman_lengths(histogram);
  Tensor lengths = torch::stable::new_empty(counts, {256}, ScalarType::Byte);
  std::copy(found.begin(), found.end(), static_cast<uint8_t*>(lengths.mutable_data_ptr()));
  return lengths;
}

Tensor huffman_encode(const Tensor& symbols) {
  check_bytes(symbols, "symbols");
  const auto* in = static_cast<const uint8_t*>(symbols.const_data_ptr());
  HuffmanWriter writer(symbols.numel());
  for_chunks(writer.chunks(), [&](int64_t chunk) { writer.count_chunk(in, chunk); });
  const auto size = static_cast<int64_t>(writer.plan());
  Tensor data = torch::stable::new_empty(symbols, {size}, ScalarType::Byte);
  auto* out = static_cast<uint8_t*>(data.mutable_data_ptr());
  writer.write_header(out);
  for_chunks(writer.chunks(), [&](int64_t chunk) { writer.encode_chunk(in, chunk, out); });
  return data;
}

Tensor huffman_decode(const Tensor& data, int64_t count) {
  check_bytes(data, "data");
  const HuffmanReader reader(static_cast<const uint8_t*>(data.const_data_ptr()), static_cast<size_t>(data.numel()));
  check(reader.count() == count,
        "the Huffman data holds " + std::to_string(reader.count()) + " symbols, expected " + std::to_string(count));
  Tensor symbols = with_large_pages(torch::stable::new_empty(data, {count}, ScalarType::Byte));
  auto* out = static_cast<uint8_t*>(symbols.mutable_data_ptr());
  std::atomic<bool> sound{true};
  for_chunks(reader.chunks(), [&](int64_t chunk) {
    if (!reader.decode_chunk(chunk, out)) sound = false;
  });
  check(sound, "the Huffman data is damaged: a stream does not end with its last symbol");
  return symbols;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) {
  m.impl("huffman_lengths", TORCH_BOX(&lengths_of));
  m.impl("huffman_encode", TORCH_BOX(&huffman_encode));
  m.impl("huffman_decode", TORCH_BOX(&huffman_decode));
}

}  // namespace phiquant
