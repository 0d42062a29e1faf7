// Byte layouts of the file formats, and packing of codes into them. No arithmetic on values: codes
// and fp16 parameters go in, bytes come out.
#pragma once

#include <cstdint>

namespace phiquant {

// GGUF blocks of 32 values. `d`, `m`: fp16 bits, little endian. Byte j of `qs` holds value j in its
// low half and value j + 16 in its high half.
struct BlockQ4_0 {
  uint16_t d;
  uint8_t qs[16];  // code + 8
};
static_assert(sizeof(BlockQ4_0) == 18, "Q4_0 is 18 bytes a block");

struct BlockQ4_1 {
  uint16_t d;
  uint16_t m;
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_1) == 20, "Q4_1 is 20 bytes a block");

struct BlockQ8_0 {
  uint16_t d;
  int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34, "Q8_0 is 34 bytes a block");

// codes [blocks * 32]; d, m fp16 bits [blocks].
void pack_q4_0(const int8_t* codes, const uint16_t* d, int64_t blocks, BlockQ4_0* out);
void pack_q4_1(const uint8_t* codes, const uint16_t* d, const uint16_t* m, int64_t blocks, BlockQ4_1* out);
void pack_q8_0(const int8_t* codes, const uint16_t* d, int64_t blocks, BlockQ8_0* out);

// compressed-tensors: eight 4-bit codes in an int32, value j of the eight in bits 4j, each stored as
// code + 8. codes [rows * cols], cols a multiple of 8; out [rows * cols / 8].
void pack_int32(const int8_t* codes, int64_t words, uint32_t* out);

}  // namespace phiquant
