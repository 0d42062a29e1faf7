// The block types of GGUF: codes and parameters go in as they are stored, bytes come out. No arithmetic on values.
#pragma once

#include <cstdint>
#include <string_view>

namespace phiquant {

// What blocks are made of. A type takes those its description names; the others are null.
struct GgufParts {
  const uint8_t* codes = nullptr;     // [blocks * values]; int8 where the type's codes are signed
  const uint16_t* d = nullptr;        // [blocks] fp16 bits: the scale, or that of the sub-scales
  const uint16_t* m = nullptr;        // [blocks] fp16 bits: the minimum, or the scale of the sub-minimums
  const uint8_t* scales = nullptr;    // [blocks * values / group] codes of sub-scales; bits of an e8m0 or e4m3 scale
  const uint8_t* minimums = nullptr;  // [blocks * values / group] codes of sub-minimums
};

struct GgufType {
  const char* name;
  int values;  // of a block
  int bytes;   // of a block
  int group;   // values that share an item of `scales`; 0: there are none
  bool d;      // which parts it takes
  bool m;
  bool minimums;
  void (*pack)(const GgufParts& parts, int64_t blocks, uint8_t* out);
};

// The type of that name ("Q4_K"), or null. Codes beyond the type's bits are cut: who packs has checked them.
const GgufType* gguf_type(std::string_view name);

// Blocks of 32 values with scales of their own (pack_gguf_blocks.cpp).
void pack_q4_0(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_q4_1(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_q5_0(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_q5_1(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_q8_0(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_iq4_nl(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_mxfp4(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_nvfp4(const GgufParts& parts, int64_t blocks, uint8_t* out);
// Super-blocks of 256 values (pack_gguf_super.cpp).
void pack_q2_k(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_q3_k(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_q4_k(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_q5_k(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_q6_k(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_iq4_xs(const GgufParts& parts, int64_t blocks, uint8_t* out);
// Super-blocks of ternary values with one scale (pack_gguf_ternary.cpp).
void pack_tq1_0(const GgufParts& parts, int64_t blocks, uint8_t* out);
void pack_tq2_0(const GgufParts& parts, int64_t blocks, uint8_t* out);

}  // namespace phiquant
