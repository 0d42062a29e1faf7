// Lanes of one float: what a template over lanes runs on at level `scalar`, as its meaning.
// For files compiled for the baseline CPU alone (core/half.h says why).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/half.h"
#include "core/range.inl"

namespace phiquant {
namespace {

struct ScalarRounding {
  static float round_f16(float v) { return to_float(from_float<f16>(v)); }
  static float round_bf16(float v) { return to_float(from_float<bf16>(v)); }
  static float power_of_two(float v) { return std::bit_cast<float>(std::bit_cast<uint32_t>(v) & 0x7f800000u); }
};

struct Scalar : Lane<ScalarRounding> {
  static constexpr int64_t width = 1;
  template <class T>
  static F load(const T* p) {
    return to_float(*p);
  }
  template <class T>
  static void store(T* p, F v) {
    *p = from_float<T>(v);
  }
  static bool any(Mask m) { return m; }
  static F first_lanes(F v, int64_t) { return v; }
  static F select_in_range(F t, F lo, F hi, F v) { return t >= lo && t <= hi ? v : 0.0f; }
  static F bits(uint32_t b) { return std::bit_cast<float>(b); }
  static F bit_and(F a, F b) { return bits(std::bit_cast<uint32_t>(a) & std::bit_cast<uint32_t>(b)); }
  static F bit_or(F a, F b) { return bits(std::bit_cast<uint32_t>(a) | std::bit_cast<uint32_t>(b)); }
  static void transpose(F*) {}

  // What codec.inl asks for to find the nearest level.
  using I = int32_t;
  static I set1i(int v) { return v; }
  static I bits(F v) { return std::bit_cast<int32_t>(v); }
  static F floats(I v) { return std::bit_cast<float>(v); }
  static I add(I a, I b) { return a + b; }
  static F add(F a, F b) { return a + b; }
  static I bit_and(I a, I b) { return a & b; }
  static I bit_or(I a, I b) { return a | b; }
  static I shift_left(I v, int n) { return static_cast<I>(static_cast<uint32_t>(v) << n); }
  static I shift_right(I v, int n) { return static_cast<I>(static_cast<uint32_t>(v) >> n); }
  static F copy_sign(F v, F s) { return std::copysign(v, s); }
  static I count(I n, Mask m) { return n + m; }
  template <int kBits>
  static F lookup(const float* table, I i) {
    return table[i % (1 << kBits)];
  }
  template <int kBits>
  static F lookup(const float* table, I i, const Mask*) {
    return lookup<kBits>(table, i);
  }
};

}  // namespace
}  // namespace phiquant
