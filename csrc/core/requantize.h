// From 32-bit sums to 8-bit codes without floats: multiply by a real number M that is kept as an integer.
//
// M = multiplier * 2^-31 * 2^-shift with 2^30 <= multiplier < 2^31: the real multiplier as a fraction of
// 31 bits in [0.5, 1) and a power of two. A sum s becomes
//     code = clamp(zero_point + rounding_shift(doubling_high(s, multiplier), shift), qmin, qmax)
// which is gemmlowp's fixed point (fixedpoint/fixedpoint.h), bit for bit. M >= 1 has a negative shift: the
// sum is shifted left first, and saturates. Two roundings follow each other, so a code can be 1 from
// the one that round(s * M) gives.
#pragma once

#include <cstdint>

namespace phiquant {

struct Multiplier {
  int32_t multiplier;
  int32_t shift;
};

// The M nearest to `real`, which must be finite and >= 0. Below 2^-32 it is 0; from 2^30 the largest.
Multiplier quantize_multiplier(double real);

// high 32 bits of 2 a b, rounded half up: round(a b / 2^31). Only a = b = -2^31 saturates.
int32_t doubling_high(int32_t a, int32_t b);

// round(v / 2^n), halves away from zero; 0 <= n <= 31.
int32_t rounding_shift(int32_t v, int32_t n);

// v * M as above. -30 <= shift <= 31.
int32_t multiply(int32_t v, Multiplier m);

// How sums of N columns become codes; multiplier, shift [N]. qmin <= zero_point <= qmax is not needed.
struct Requantize {
  const int32_t* multiplier;
  const int32_t* shift;
  int32_t zero_point;
  int32_t qmin;
  int32_t qmax;
};

}  // namespace phiquant
