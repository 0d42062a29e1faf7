// Scales in two levels: s_b = D c_b, c_b the code of block b, D the scale of its super-block of `subs` blocks.
//
// The upper level is the rule of the lower one again, by the same kernels: the ideal scales of a
// super-block are quantized like the values of a block. With Rule::minimum the range is widened to hold 0,
// the minimums -m_b = D' c'_b come first, and the scale follows from the minimum as stored.
#pragma once

#include <cstddef>
#include <vector>

#include "core/affine.h"

namespace phiquant {

struct TwoLevelSpec {
  RangeSpec block;  // of the values; storage f32: the ideal scale
  RangeSpec super;  // of the ideal scales: their codes, and how D is stored
  int64_t subs;
};

// Finds the scales of a run of blocks and holds them for as long as it lives.
class TwoLevelScales {
 public:
  explicit TwoLevelScales(TwoLevelSpec spec) : spec_(spec) {}

  // Scale and offset of the blocks of x as stored, valid until the next call. D is `super_scale`, or, where
  // that is null, found for each of the whole super-blocks that x then holds (there alone minimums work).
  BlockParams find(const void* x, Layout layout, const float* super_scale);

 private:
  // The values that ideal [blocks] are stored as.
  void store(const float* ideal, int64_t blocks, const float* super_scale, float* stored);

  TwoLevelSpec spec_;
  std::vector<float> ideal_, scale_, offset_, super_, unused_;
  std::vector<int8_t> codes_;
};

}  // namespace phiquant
