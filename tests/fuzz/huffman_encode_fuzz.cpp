// Any bytes, taken as symbols: what the encoder makes of them decodes to them, fast and slowly. The first byte
// says how often the rest is repeated, so that small inputs reach four streams and several chunks.
#include "core/huffman.h"
#include "fuzz.h"
#include "huffman_slow.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const size_t times = data[0] < 128 ? 1 : data[0] < 250 ? 8 : std::min<size_t>(140'000 / size + 1, 2000);
  std::vector<uint8_t> symbols;
  for (size_t i = 0; i < times; ++i) symbols.insert(symbols.end(), data + 1, data + size);

  phiquant::HuffmanWriter writer(static_cast<int64_t>(symbols.size()));
  for (int64_t i = 0; i < writer.chunks(); ++i) writer.count_chunk(symbols.data(), i);
  const size_t bytes = writer.plan();
  const std::unique_ptr<uint8_t[]> encoded(new uint8_t[bytes]);
  writer.write_header(encoded.get());
  for (int64_t i = 0; i < writer.chunks(); ++i) writer.encode_chunk(symbols.data(), i, encoded.get());

  const phiquant::HuffmanReader reader(encoded.get(), bytes);
  EXPECT(reader.count() == static_cast<int64_t>(symbols.size()));
  const std::unique_ptr<uint8_t[]> decoded(new uint8_t[symbols.size()]);
  for (int64_t i = 0; i < reader.chunks(); ++i) EXPECT(reader.decode_chunk(i, decoded.get()));
  EXPECT(std::equal(symbols.begin(), symbols.end(), decoded.get()));
  if (symbols.size() < 20'000) EXPECT(phiquant::decode_slowly({encoded.get(), encoded.get() + bytes}) == symbols);
  return 0;
}
