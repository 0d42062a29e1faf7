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

// What the second parameter of a block means.
enum class Offset {
  zero_point,  // y = s * (q - z), z an integer; also used without offsets, z = 0
  minimum,     // y = s * q + m
};

// The integer codes of a grid: qmin <= q <= qmax, as floats because all arithmetic is in fp32.
struct Grid {
  float qmin;
  float qmax;
  Offset offset;
};

// How a range [lo, hi] becomes scale and offset.
enum class Rule {
  absmax,         // s = max|x| / qmax
  signed_absmax,  // s = x* / qmin, x* = the value of largest magnitude, with its sign
  zero_point,     // s = (hi - lo) / (qmax - qmin), the range widened to hold 0; z = rne(qmin - lo / s)
  minimum,        // m = lo, s = (hi - m) / (qmax - qmin)
};

// Parameters of one block, already rounded to the type in which they are stored.
struct Params {
  float scale;
  float offset;
};

// Everything needed to find the parameters of a block from its values.
struct RangeSpec {
  Grid grid;
  Rule rule;
  Dtype storage;  // type in which scale and minimum are stored: the stored value is the grid
};

}  // namespace phiquant
