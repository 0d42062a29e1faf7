// From the range of a block to its stored parameters: the one rule, compiled into every CPU level.
//
// Written over lanes V: one float (Lane below), or a vector of them, a block in each lane. V gives F, Mask
// and set1, add, sub, mul, div, max, min, abs, round, less, less_equal, select, round_f16, round_bf16,
// power_of_two (the largest that is not above a value of at least FLT_MIN; 0 of smaller ones); max and min give the
// second operand where one is NaN, as the CPU's do.
//
// In an anonymous namespace on purpose: each level compiles its own copy with its own flags, and the
// linker cannot put one level's copy in another's place.

#pragma once

#include <cfloat>
#include <cmath>

#include "core/types.h"

namespace phiquant {
namespace {

// One block at a time. Store rounds a float to fp16, bf16 or a power of two.
template <class Store>
struct Lane {
  using F = float;
  using Mask = bool;
  static F set1(float v) { return v; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F abs(F a) { return std::fabs(a); }
  static F round(F a) { return std::nearbyint(a); }
  static Mask less(F a, F b) { return a < b; }
  static Mask less_equal(F a, F b) { return a <= b; }
  static F select(Mask m, F a, F b) { return m ? a : b; }
  static F power_of_two(F a) { return Store::power_of_two(a); }
  static F round_f16(F a) { return Store::round_f16(a); }
  static F round_bf16(F a) { return Store::round_bf16(a); }
};

// The n values that are left of a block, fewer than a vector; missing lanes repeat the first value.
template <class V, class T>
typename V::F load_part(const T* p, int64_t n) {
  if constexpr (requires { V::load_part(p, n); }) return V::load_part(p, n);
  T buffer[V::width];
  for (int64_t i = 0; i < V::width; ++i) buffer[i] = p[i < n ? i : 0];
  return V::load(buffer);
}

// Scale and offset of one block, or of a vector of blocks.
template <class V>
struct Found {
  typename V::F scale;
  typename V::F offset;
};

template <class V>
struct Range {
  using F = typename V::F;

  // 1 / s; 0 for a scale that is zero or so small that its reciprocal overflows, so that every value
  // of such a block gets the code of zero.
  static F inverse(F scale) {
    return V::select(V::less(V::abs(scale), V::set1(FLT_MIN)), V::set1(0.0f), V::div(V::set1(1.0f), scale));
  }

  // Into [lo, hi]; lo where v is NaN.
  static F clamp(F v, float lo, float hi) { return V::min(V::max(v, V::set1(lo)), V::set1(hi)); }

  // Rounded to e4m3, to even: to a multiple of the step between its neighbours, a power of two.
  static F round_e4m3(F v) {
    const F step = V::mul(V::max(V::power_of_two(V::abs(v)), V::set1(0x1p-6f)), V::set1(0x1p-3f));
    return V::mul(V::round(V::div(v, step)), step);
  }

  // The value as it will stand in the file: rounded to its type, kept finite; an fp32 or bf16
  // subnormal becomes zero, and zero is +0 (else its sign would depend on the order of a reduction).
  static F stored(F v, Storage type) {
    constexpr float kLargest[] = {FLT_MAX, 0x1.fep127f, 65504.0f, 0x1p127f, 448.0f};
    constexpr float kSmallest[] = {FLT_MIN, FLT_MIN, 0x1p-24f, 0x1p-127f, 0x1p-9f};
    const float largest = kLargest[static_cast<int>(type)];
    const float smallest = kSmallest[static_cast<int>(type)];
    if (type == Storage::e8m0) return V::max(V::power_of_two(clamp(v, smallest, largest)), V::set1(smallest));
    v = clamp(v, -largest, largest);
    if (type == Storage::f16) v = V::round_f16(v);
    if (type == Storage::bf16) v = V::round_bf16(v);
    if (type == Storage::e4m3) v = round_e4m3(v);
    return V::select(V::less(V::abs(v), V::set1(smallest)), V::set1(0.0f), v);
  }

  // lo, hi: smallest and largest value of the block, NaN left out; lo > hi if there was no value. For the
  // rules that take means: the threshold (twn; else 0) and the mean that becomes the scale.
  static Found<V> parameters(F lo, F hi, const RangeSpec& spec) {
    const F zero = V::set1(0.0f);
    const Grid& grid = spec.grid;
    const F steps = V::set1(grid.qmax - grid.qmin);
    const F depth = V::sub(zero, lo);
    Found<V> found{zero, zero};
    switch (spec.rule) {
      case Rule::absmax:
        found.scale = V::set1(grid.qmax);
        if (spec.storage == Storage::e8m0) found.scale = V::power_of_two(found.scale);
        found.scale = stored(V::div(V::max(depth, hi), found.scale), spec.storage);
        break;
      case Rule::signed_absmax: {  // of two values of the same magnitude the negative one is the anchor
        const F extreme = V::select(V::less_equal(hi, depth), lo, hi);
        found.scale = stored(V::div(extreme, V::set1(grid.qmin)), spec.storage);
        break;
      }
      case Rule::zero_point: {
        const F low = V::min(lo, zero);
        found.scale = stored(V::div(V::sub(V::max(hi, zero), low), steps), spec.storage);
        const F shift = V::mul(low, inverse(found.scale));
        found.offset = clamp(V::round(V::sub(V::set1(grid.qmin), shift)), grid.qmin, grid.qmax);
        break;
      }
      case Rule::minimum:
        found.offset = stored(lo, spec.storage);
        found.scale = stored(V::div(V::max(V::sub(hi, found.offset), zero), steps), spec.storage);
        break;
      case Rule::absmean:
      case Rule::twn:
        found.scale = stored(hi, spec.storage);
        break;
    }
    const auto known = V::less_equal(lo, hi);
    return {V::select(known, found.scale, zero), V::select(known, found.offset, zero)};
  }
};

// True for the rules that are found from means of |x|, not from the smallest and largest value.
inline bool takes_means(Rule rule) { return rule == Rule::absmean || rule == Rule::twn; }

// The mean of `count` values that add up to `sum`, times `factor`; 0 of none.
inline float mean_of(double sum, int64_t count, float factor = 1.0f) {
  return count > 0 ? factor * static_cast<float>(sum / static_cast<double>(count)) : 0.0f;
}

// What a value is multiplied with before it is rounded, where the rule, not the scale, decides it:
// rne(x / (2 D)) is 0 up to |x| = D.
template <class V>
inline typename V::F encoding_inverse(Rule rule, typename V::F threshold, typename V::F scale) {
  return Range<V>::inverse(rule == Rule::twn ? V::add(threshold, threshold) : scale);
}

template <class Store>
inline float inverse(float scale) {
  return Range<Lane<Store>>::inverse(scale);
}

template <class Store>
inline Params params_from_range(float lo, float hi, const RangeSpec& spec) {
  const Found<Lane<Store>> found = Range<Lane<Store>>::parameters(lo, hi, spec);
  return {found.scale, found.offset};
}

}  // namespace
}  // namespace phiquant
