// From the range of a block to its stored parameters: the one rule, compiled into every CPU level.
//
// In an anonymous namespace on purpose: each level compiles its own copy with its own flags, and the
// linker cannot put one level's copy in another's place. `Store` rounds a float to fp16 or bf16.

#include <cfloat>
#include <cmath>

#include "core/types.h"

namespace phiquant {
namespace {

// 1 / s; 0 for a scale that is zero or so small that its reciprocal overflows, so that every value
// of such a block gets the code of zero.
inline float inverse(float scale) { return std::fabs(scale) < FLT_MIN ? 0.0f : 1.0f / scale; }

// Selects as the vector instructions do: the bound where v is NaN.
inline float clamp(float v, float lo, float hi) {
  v = v > lo ? v : lo;
  return v < hi ? v : hi;
}

// The value as it will stand in the file: rounded to its type, kept finite; an fp32 or bf16
// subnormal becomes zero, and zero is +0 (else its sign would depend on the order of a reduction).
template <class Store>
inline float stored(float v, Dtype type) {
  const float largest = type == Dtype::f16 ? 65504.0f : type == Dtype::bf16 ? 0x1.fep127f : FLT_MAX;
  v = clamp(v, -largest, largest);
  if (type == Dtype::f16) v = Store::round_f16(v);
  if (type == Dtype::bf16) v = Store::round_bf16(v);
  const float smallest = type == Dtype::f16 ? 0x1p-24f : FLT_MIN;
  return std::fabs(v) < smallest ? 0.0f : v;
}

// lo, hi: smallest and largest value of the block, NaN left out; lo > hi if there was no value.
template <class Store>
inline Params params_from_range(float lo, float hi, const RangeSpec& spec) {
  const Grid& grid = spec.grid;
  if (!(lo <= hi)) return {0.0f, 0.0f};
  switch (spec.rule) {
    case Rule::absmax:
      return {stored<Store>((-lo > hi ? -lo : hi) / grid.qmax, spec.storage), 0.0f};
    case Rule::signed_absmax:  // of two values of the same magnitude the negative one is the anchor
      return {stored<Store>((-lo >= hi ? lo : hi) / grid.qmin, spec.storage), 0.0f};
    case Rule::zero_point: {
      lo = lo < 0.0f ? lo : 0.0f;
      hi = hi > 0.0f ? hi : 0.0f;
      const float scale = stored<Store>((hi - lo) / (grid.qmax - grid.qmin), spec.storage);
      const float zero = std::nearbyint(grid.qmin - lo * inverse(scale));
      return {scale, clamp(zero, grid.qmin, grid.qmax)};
    }
    case Rule::minimum: {
      const float minimum = stored<Store>(lo, spec.storage);
      const float width = hi - minimum;
      return {stored<Store>((width > 0.0f ? width : 0.0f) / (grid.qmax - grid.qmin), spec.storage), minimum};
    }
  }
  return {0.0f, 0.0f};
}

// The search for the range of least squared error tries shrunken ranges: first from 1 down in steps
// of 0.04, then around the best in steps of 0.01. For signed_absmax both signs of the scale are tried.
constexpr int kCoarseSteps = 16;
constexpr float kCoarseStep = 0.04f;
constexpr int kFineSteps = 3;
constexpr float kFineStep = 0.01f;

// `error(params)` gives the block's sum of squared errors on that grid (a double, in fixed order).
template <class Store, class Error>
Params search_range(float lo, float hi, const RangeSpec& spec, Error error) {
  Params best = params_from_range<Store>(lo, hi, spec);
  double least = error(best);
  float best_ratio = 1.0f;
  float best_side = 0.0f;
  // side: 0 = the rule's own choice of anchor, -1 / +1 = anchored on the low / high end.
  auto try_ratio = [&](float ratio, float side) {
    float a = lo * ratio;
    float b = hi * ratio;
    if (spec.rule == Rule::minimum) {  // shrink about the middle, not about zero
      const float middle = 0.5f * lo + 0.5f * hi;
      a = middle + (lo - middle) * ratio;
      b = middle + (hi - middle) * ratio;
    } else if (side != 0.0f) {
      const float extreme = (-lo > hi ? -lo : hi) * ratio;
      a = side < 0.0f ? -extreme : 0.0f;
      b = side < 0.0f ? 0.0f : extreme;
    }
    const Params candidate = params_from_range<Store>(a, b, spec);
    const double e = error(candidate);
    if (e < least) {
      least = e;
      best = candidate;
      best_ratio = ratio;
      best_side = side;
    }
  };
  const bool both = spec.rule == Rule::signed_absmax;
  for (int i = 0; i < kCoarseSteps; ++i) {
    const float ratio = 1.0f - kCoarseStep * static_cast<float>(i);
    try_ratio(ratio, both ? -1.0f : 0.0f);
    if (both) try_ratio(ratio, 1.0f);
  }
  const float center = best_ratio;
  const float side = best_side;
  for (int i = -kFineSteps; i <= kFineSteps; ++i) try_ratio(center + kFineStep * static_cast<float>(i), side);
  return best;
}

}  // namespace
}  // namespace phiquant
