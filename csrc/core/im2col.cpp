#include "core/im2col.h"

#include <cstring>

#include "core/gemm.h"

namespace phiquant {

void im2col(const uint8_t* x, const Window& w, int64_t group, int64_t first, int64_t rows, uint8_t outside,
            uint8_t* y) {
  const int64_t out_h = w.out(0);
  const int64_t out_w = w.out(1);
  const auto run = static_cast<size_t>(w.channels / w.groups);
  const int64_t channel = group * w.channels / w.groups;
  const int64_t rest = padded(w.length()) - w.length();
  for (int64_t row = first; row < first + rows; ++row) {
    const int64_t image = row / (out_h * out_w);
    const int64_t top = row / out_w % out_h * w.stride[0] - w.padding[0];
    const int64_t left = row % out_w * w.stride[1] - w.padding[1];
    for (int64_t i = 0; i < w.kernel[0]; ++i) {
      const int64_t line = top + i * w.dilation[0];
      for (int64_t j = 0; j < w.kernel[1]; ++j, y += run) {
        const int64_t column = left + j * w.dilation[1];
        if (line < 0 || line >= w.height || column < 0 || column >= w.width) {
          std::memset(y, outside, run);
        } else {
          std::memcpy(y, x + ((image * w.height + line) * w.width + column) * w.channels + channel, run);
        }
      }
    }
    std::memset(y, 0, static_cast<size_t>(rest));
    y += rest;
  }
}

}  // namespace phiquant
