// Any bytes, given to the Huffman decoder: it accepts and yields exactly what the slow decoder does.
#include <stdexcept>

#include "core/huffman.h"
#include "fuzz.h"
#include "huffman_slow.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto expected = phiquant::decode_slowly({data, data + size});
  const auto bytes = exact(data, size);
  bool sound = true;
  std::vector<uint8_t> symbols;
  try {
    const phiquant::HuffmanReader reader(bytes.get(), size);
    EXPECT(reader.count() <= 8 * static_cast<int64_t>(size));
    symbols.resize(static_cast<size_t>(reader.count()));
    for (int64_t i = 0; i < reader.chunks(); ++i) sound = reader.decode_chunk(i, symbols.data()) && sound;
  } catch (const std::invalid_argument&) {
    sound = false;
  }
  EXPECT(sound == expected.has_value());
  EXPECT(!sound || symbols == *expected);
  return 0;
}
