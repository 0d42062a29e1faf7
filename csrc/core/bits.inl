// The kernels of bits.h, compiled once for every CPU level: eight words are one vector of the compiler's own
// kind, which each level splits to its width. In an anonymous namespace, so that no level's copy stands in
// for another's. Little-endian machines, as the file formats are.
#include <cstring>

#include "core/bits.h"

namespace phiquant {
namespace {

constexpr uint64_t kBytes = 0x0101010101010101ULL;

// Codes are worked on in words of eight, a byte each, and words in runs of eight. W below is either; it
// is passed by reference, as how a vector is passed by value differs between the levels.
constexpr int64_t kWords = 8;
constexpr int64_t kRun = 8 * kWords;
typedef uint64_t Words __attribute__((vector_size(kRun)));

// Byte by byte a + b mod 256: the top bits are added without a carry.
template <class W>
inline void add_bytes(W& a, uint64_t b) {
  constexpr uint64_t top = 0x80 * kBytes;
  a = ((a & ~top) + (b & ~top)) ^ ((a ^ b) & top);
}

// `low` (or -low) in every byte.
inline uint64_t spread(int value) { return static_cast<uint8_t>(value) * kBytes; }

// The low `bits` bits of every run of `run` bits.
constexpr uint64_t low_bits(int run, int bits) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += run) mask |= ((1ULL << bits) - 1) << at;
  return mask;
}

// Two neighbours of kFrom bits each, at the start of runs of kSpan / 2 bits, side by side; and back.
template <int kSpan, int kFrom, class W>
inline void join(W& v) {
  constexpr uint64_t low = low_bits(kSpan, kFrom);
  v = (v & low) | (v >> (kSpan / 2 - kFrom) & low << kFrom);
}
template <int kSpan, int kFrom, class W>
inline void part(W& v) {
  constexpr uint64_t low = low_bits(kSpan, kFrom);
  v = (v & low) | (v & low << kFrom) << (kSpan / 2 - kFrom);
}

// The low B bits of the eight bytes of a word as 8 B bits, in three doublings; and back.
template <int B, class W>
inline void gather(W& v) {
  join<16, B>(v);
  join<32, 2 * B>(v);
  join<64, 4 * B>(v);
}
template <int B, class W>
inline void scatter(W& v) {
  part<64, 4 * B>(v);
  part<32, 2 * B>(v);
  part<16, B>(v);
}

template <int B>
bool pack(const int8_t* codes, int64_t n, int low, uint8_t* packed) {
  const uint64_t shift = spread(-low);
  const uint8_t* end = packed + packed_bytes(n, B);
  uint64_t seen = 0;
  Words all_seen = {};
  // A word of B bytes is written as 8: the bytes after it are written over next.
  for (; n >= kRun && end - packed >= B * (kWords - 1) + 8; n -= kRun, codes += kRun, packed += B * kWords) {
    Words v;
    std::memcpy(&v, codes, kRun);
    add_bytes(v, shift);
    all_seen |= v;
    gather<B>(v);
    for (int k = 0; k < kWords; ++k) {
      const uint64_t word = v[k];
      std::memcpy(packed + B * k, &word, 8);
    }
  }
  for (int k = 0; k < kWords; ++k) seen |= all_seen[k];
  for (; n > 0; n -= 8, codes += 8, packed += B) {
    uint64_t v = spread(low);  // missing codes are stored as 0
    std::memcpy(&v, codes, static_cast<size_t>(n < 8 ? n : 8));
    add_bytes(v, shift);
    seen |= v;
    gather<B>(v);
    std::memcpy(packed, &v, static_cast<size_t>(n < 8 ? packed_bytes(n, B) : B));
  }
  return (seen & ~low_bits(8, B)) == 0;
}

template <int B>
void unpack(const uint8_t* packed, int64_t n, int low, int8_t* codes) {
  const uint64_t shift = spread(low);
  const uint8_t* end = packed + packed_bytes(n, B);
  // A word of B bytes is read as 8: the bytes after it must exist, and are masked away.
  for (; n >= kRun && end - packed >= B * (kWords - 1) + 8; n -= kRun, codes += kRun, packed += B * kWords) {
    Words v;
    for (int k = 0; k < kWords; ++k) {
      uint64_t word;
      std::memcpy(&word, packed + B * k, 8);
      v[k] = word;
    }
    scatter<B>(v);
    add_bytes(v, shift);
    std::memcpy(codes, &v, kRun);
  }
  for (; n > 0; n -= 8, codes += 8, packed += B) {
    uint64_t v = 0;
    std::memcpy(&v, packed, static_cast<size_t>(n < 8 ? packed_bytes(n, B) : B));
    scatter<B>(v);
    add_bytes(v, shift);
    std::memcpy(codes, &v, static_cast<size_t>(n < 8 ? n : 8));
  }
}

// Calls f.operator()<bits>() for bits 1 .. 8.
template <class F>
auto with_bits(int bits, F f) {
  switch (bits) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    case 7:
      return f.template operator()<7>();
    default:
      return f.template operator()<8>();
  }
}

// Byte 4 of trits * kPowers is t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4; the bytes below it stay below 256.
constexpr uint64_t kPowers = 81 | 27 << 8 | 9 << 16 | 3 << 24 | 1ULL << 32;
constexpr uint64_t kFive = 0xffffffffffULL;

// The five trits of each byte below 243, a byte each.
struct TritTable {
  uint64_t trits[256] = {};
  constexpr TritTable() {
    for (uint64_t byte = 0; byte < 243; ++byte) {
      uint64_t rest = byte;
      for (int digit = 0; digit < kTritsPerByte; ++digit, rest /= 3) trits[byte] |= rest % 3 << 8 * digit;
    }
  }
};
constexpr TritTable kTable;

// Bits that are set where a byte is not 0, 1 or 2.
inline uint64_t not_trits(uint64_t v) { return (v | (v & v >> 1) << 2) & 0xfcfcfcfcfcULL; }

bool pack_trits(const int8_t* codes, int64_t n, int low, uint8_t* packed) {
  const uint64_t shift = spread(-low);
  uint64_t wrong = 0;
  auto put = [&](uint64_t v) {
    add_bytes(v, shift);
    v &= kFive;
    wrong |= not_trits(v);
    *packed++ = static_cast<uint8_t>(v * kPowers >> 32);
  };
  for (; n >= 8; n -= kTritsPerByte, codes += kTritsPerByte) {
    uint64_t v;
    std::memcpy(&v, codes, 8);
    put(v);
  }
  for (; n > 0; n -= kTritsPerByte, codes += kTritsPerByte) {
    uint64_t v = spread(low);
    std::memcpy(&v, codes, static_cast<size_t>(n < kTritsPerByte ? n : kTritsPerByte));
    put(v);
  }
  return wrong == 0;
}

bool unpack_trits(const uint8_t* packed, int64_t n, int low, int8_t* codes) {
  const uint64_t shift = spread(low);
  uint8_t largest = 0;
  auto take = [&] {
    largest = *packed > largest ? *packed : largest;
    uint64_t v = kTable.trits[*packed++];
    add_bytes(v, shift);
    return v;
  };
  for (; n >= 8; n -= kTritsPerByte, codes += kTritsPerByte) {  // three bytes too many, written over next
    const uint64_t v = take();
    std::memcpy(codes, &v, 8);
  }
  for (; n > 0; n -= kTritsPerByte, codes += kTritsPerByte) {
    const uint64_t v = take();
    std::memcpy(codes, &v, static_cast<size_t>(n < kTritsPerByte ? n : kTritsPerByte));
  }
  return largest < 243;
}

bool pack_bits(const int8_t* codes, int64_t n, int bits, int low, uint8_t* packed) {
  return with_bits(bits, [&]<int B>() { return pack<B>(codes, n, low, packed); });
}

void unpack_bits(const uint8_t* packed, int64_t n, int bits, int low, int8_t* codes) {
  with_bits(bits, [&]<int B>() { unpack<B>(packed, n, low, codes); });
}

constexpr BitKernels table = {pack_bits, unpack_bits, pack_trits, unpack_trits};

}  // namespace
}  // namespace phiquant
