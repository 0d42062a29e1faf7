// Codes of 1 to 8 bits as a dense stream of bytes, and ternary codes five to a byte.
//
// Stream: code i occupies bits [i * bits, (i + 1) * bits), the lowest bit first, so that 3- and 5-bit
// codes cross the borders of bytes. What is stored is code - low, 0 .. 2^bits - 1: `low` is the smallest
// code of the element (-8 for a signed 4-bit one), so signed codes stand in offset binary, as MLX and
// compressed-tensors have them. The bits after the last code are 0.
//
// Trits: byte = t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4, t = code - low in 0 .. 2: 1.6 bits a code. The codes
// missing after the last one count as t = 0.
#pragma once

#include <cstdint>

namespace phiquant {

constexpr int64_t kTritsPerByte = 5;

// Bytes that `n` codes take.
constexpr int64_t packed_bytes(int64_t n, int bits) { return n / 8 * bits + (n % 8 * bits + 7) / 8; }
constexpr int64_t packed_trit_bytes(int64_t n) { return n / kTritsPerByte + (n % kTritsPerByte != 0); }

// The kernels of one CPU level.
struct BitKernels {
  // codes [n] to packed [packed_bytes(n, bits)]. Returns whether every code - low was 0 .. 2^bits - 1.
  bool (*pack_bits)(const int8_t* codes, int64_t n, int bits, int low, uint8_t* packed);
  void (*unpack_bits)(const uint8_t* packed, int64_t n, int bits, int low, int8_t* codes);
  // codes [n] to packed [packed_trit_bytes(n)]. Returns whether every code - low was 0, 1 or 2.
  bool (*pack_trits)(const int8_t* codes, int64_t n, int low, uint8_t* packed);
  // Returns whether every byte was below 3^5 = 243; the codes of one that is not are `low`.
  bool (*unpack_trits)(const uint8_t* packed, int64_t n, int low, int8_t* codes);
};

// The kernels of the current CPU level (core/cpu.h), and the tables behind them.
const BitKernels& bit_kernels();
extern const BitKernels bits_ref;
extern const BitKernels bits_avx2;
extern const BitKernels bits_avx512;

}  // namespace phiquant
