// The words shared by all kernels: how a value is stored, what a grid is, where its scale comes from.
//
// Legend for shapes: a tensor is `blocks` runs of `block` consecutive values; the values of one run
// share one scale (and one offset). A group, a row, a whole tensor are blocks of different length.
#pragma once

#include <cstdint>

namespace phiquant {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
enum class Dtype { f32, bf16, f16 };

// How a scale is stored. e8m0: a power of two 2^-127 .. 2^127, of which MX formats take the largest that is
// not above the ideal scale; e4m3: a float8 of at most 448. These two hold scales alone, no minimum.
enum class Storage { f32, bf16, f16, e8m0, e4m3 };

// What the second parameter of a block means.
enum class Offset {
  zero_point,  // y = s * (q - z), z an integer; also used without offsets, z = 0
  minimum,     // y = s * q + m
};

// How a code is read: as an integer, as the bits of a small float, or as an index into a table of levels.
enum class Format { integer, e4m3fn, e5m2, e2m1, e1m2, e3m0, table };

// A float of 1 + exponent + fraction bits; the exponent's bias is 1 - emin.
struct Minifloat {
  int exponent;
  int fraction;
  int emin;       // of the smallest normal value, 2^emin; subnormals are multiples of 2^(emin - fraction)
  float largest;  // finite value
  float reach;    // the largest float that would round to `largest` if the format went on beyond it
  float special;  // a bit pattern that reads as a larger value is infinity below this, NaN from here on
};
inline constexpr Minifloat kMinifloats[] = {
    {},  // Format::integer
    {4, 3, -6, 448.0f, 464.0f, 0.0f},
    {5, 2, -14, 57344.0f, 0x1.dffffep+15f, 65537.0f},
    {2, 1, 0, 6.0f, 0x1.bffffep+2f, 0.0f},
    {1, 2, 1, 3.5f, 0x1.dffffep+1f, 0.0f},
    {3, 0, -2, 16.0f, 0x1.7ffffep+4f, 0.0f},
};

// What the codes of a block stand for, but for its scale and offset. For integers qmin <= q <= qmax are
// the codes (as floats, because all arithmetic is in fp32); else the lowest and the highest level.
struct Grid {
  float qmin;
  float qmax;
  Offset offset = Offset::zero_point;
  Format format = Format::integer;
  // Format::table: `size` (2 to 256) ascending levels, the same for all blocks or `size` more for each.
  const float* levels = nullptr;
  int size = 0;
  bool per_block = false;
};

// How a range [lo, hi] becomes scale and offset.
enum class Rule {
  absmax,         // s = max|x| / qmax; where s is stored as e8m0, qmax is its own largest power of two
  signed_absmax,  // s = x* / qmin (or lowest level), x* = the value of largest magnitude, with its sign
  zero_point,     // s = (hi - lo) / (qmax - qmin), the range widened to hold 0; z = rne(qmin - lo / s)
  minimum,        // m = lo, s = (hi - m) / (qmax - qmin)
  absmean,        // s = mean|x|
  twn,            // D = 0.7 mean|x|, s = mean of the |x| above D; the code is 0 for |x| <= D, else +-1
};
inline constexpr float kTwnThreshold = 0.7f;

// Parameters of one block, already rounded to the type in which they are stored.
struct Params {
  float scale;
  float offset;
};

// Everything needed to find the parameters of a block from its values.
struct RangeSpec {
  Grid grid;
  Rule rule;
  Storage storage;  // type in which scale and minimum are stored: the stored value is the grid
};

}  // namespace phiquant
