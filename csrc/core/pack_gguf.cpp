#include "core/pack_gguf.h"

namespace phiquant {
namespace {

constexpr GgufType kTypes[] = {
    // name, values, bytes, group, d, m, minimums
    {"Q4_0", 32, 18, 0, true, false, false, pack_q4_0},     {"Q4_1", 32, 20, 0, true, true, false, pack_q4_1},
    {"Q5_0", 32, 22, 0, true, false, false, pack_q5_0},     {"Q5_1", 32, 24, 0, true, true, false, pack_q5_1},
    {"Q8_0", 32, 34, 0, true, false, false, pack_q8_0},     {"IQ4_NL", 32, 18, 0, true, false, false, pack_iq4_nl},
    {"MXFP4", 32, 17, 32, false, false, false, pack_mxfp4}, {"NVFP4", 64, 36, 16, false, false, false, pack_nvfp4},
    {"Q2_K", 256, 84, 16, true, true, true, pack_q2_k},     {"Q3_K", 256, 110, 16, true, false, false, pack_q3_k},
    {"Q4_K", 256, 144, 32, true, true, true, pack_q4_k},    {"Q5_K", 256, 176, 32, true, true, true, pack_q5_k},
    {"Q6_K", 256, 210, 16, true, false, false, pack_q6_k},  {"IQ4_XS", 256, 136, 32, true, false, false, pack_iq4_xs},
    {"TQ1_0", 256, 54, 0, true, false, false, pack_tq1_0},  {"TQ2_0", 256, 66, 0, true, false, false, pack_tq2_0},
};

}  // namespace

const GgufType* gguf_type(std::string_view name) {
  for (const GgufType& type : kTypes) {
    if (name == type.name) return &type;
  }
  return nullptr;
}

}  // namespace phiquant
