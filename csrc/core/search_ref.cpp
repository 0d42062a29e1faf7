// The search with lanes of one float: also what runs at level `scalar`.
#include <bit>

#include "core/half.h"
#include "core/search.inl"

namespace phiquant {
namespace {

struct Rounding {
  static float round_f16(float v) { return to_float(from_float<f16>(v)); }
  static float round_bf16(float v) { return to_float(from_float<bf16>(v)); }
};

struct Scalar : Lane<Rounding> {
  static constexpr int64_t width = 1;
  template <class T>
  static F load(const T* p) {
    return to_float(*p);
  }
  static void store(float* p, F v) { *p = v; }
  static F first_lanes(F v, int64_t) { return v; }
  static F select_in_range(F t, F lo, F hi, F v) { return t >= lo && t <= hi ? v : 0.0f; }
  static F bits(uint32_t b) { return std::bit_cast<float>(b); }
  static F bit_and(F a, F b) { return bits(std::bit_cast<uint32_t>(a) & std::bit_cast<uint32_t>(b)); }
  static F bit_or(F a, F b) { return bits(std::bit_cast<uint32_t>(a) | std::bit_cast<uint32_t>(b)); }
  static void transpose(F*) {}
};

}  // namespace

const SearchKernels search_ref = Search<Scalar>::table;

}  // namespace phiquant
