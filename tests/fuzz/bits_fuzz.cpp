// Any bytes, given to the unpackers of dense codes at every CPU level: all levels agree, nothing outside the
// bytes is touched, and packing what came out gives the bytes again wherever they were sound.
//
// The first three bytes choose the width, the smallest code, and how many codes the last byte leaves out.
#include "core/bits.h"

#include "core/cpu.h"
#include "fuzz.h"

using namespace phiquant;

namespace {

// The last byte with the bits that no code uses cleared, as a packer writes them.
std::vector<uint8_t> sound_bits(const uint8_t* packed, size_t size, int64_t n, int bits) {
  std::vector<uint8_t> sound(packed, packed + size);
  const int64_t unused = static_cast<int64_t>(8 * size) - n * bits;
  if (size > 0) sound.back() = static_cast<uint8_t>(sound.back() & 0xff >> unused);
  return sound;
}

void check_bits(const uint8_t* packed, size_t size, int bits, int low, int64_t n) {
  const auto in = exact(packed, size);
  const std::vector<uint8_t> sound = sound_bits(packed, size, n, bits);
  std::vector<int8_t> first;
  for (const Level level : available_levels()) {
    set_cpu_level(level);
    const std::unique_ptr<int8_t[]> codes(new int8_t[static_cast<size_t>(n)]);
    bit_kernels().unpack_bits(in.get(), n, bits, low, codes.get());
    const std::vector<int8_t> found(codes.get(), codes.get() + n);
    if (level == Level::scalar) first = found;
    EXPECT(found == first);
    const std::unique_ptr<uint8_t[]> again(new uint8_t[size]);
    EXPECT(bit_kernels().pack_bits(codes.get(), n, bits, low, again.get()));
    EXPECT(std::equal(sound.begin(), sound.end(), again.get()));
  }
}

void check_trits(const uint8_t* packed, size_t size, int low, int64_t n) {
  const auto in = exact(packed, size);
  const bool valid = std::all_of(packed, packed + size, [](uint8_t byte) { return byte < 243; });
  std::vector<int8_t> first;
  for (const Level level : available_levels()) {
    set_cpu_level(level);
    const std::unique_ptr<int8_t[]> codes(new int8_t[static_cast<size_t>(n)]);
    EXPECT(bit_kernels().unpack_trits(in.get(), n, low, codes.get()) == valid);
    const std::vector<int8_t> found(codes.get(), codes.get() + n);
    if (level == Level::scalar) first = found;
    EXPECT(found == first);
    const std::unique_ptr<uint8_t[]> again(new uint8_t[size]);
    EXPECT(bit_kernels().pack_trits(codes.get(), n, low, again.get()));
    if (valid && n % kTritsPerByte == 0) EXPECT(std::equal(packed, packed + size, again.get()));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 3) return 0;
  const int choice = data[0] % 9;
  const int low = data[1] % 2 == 0 ? 0 : -(1 << choice % 8);
  const int64_t left_out = data[2];
  data += 3;
  size -= 3;
  const auto bytes = static_cast<int64_t>(size);
  if (choice == 8) {
    const int64_t n = std::max<int64_t>(0, bytes * kTritsPerByte - left_out % kTritsPerByte);
    check_trits(data, size, data[-2] % 2 == 0 ? 0 : -1, n);
  } else {
    const int bits = choice + 1;
    const int64_t most = bytes * 8 / bits;
    const int64_t n = std::max<int64_t>(0, most - left_out % 8);
    check_bits(data, static_cast<size_t>(packed_bytes(n, bits)), bits, low, n);
  }
  return 0;
}
