// Convolution as a product: each output pixel's window of codes becomes a row of a matrix.
#pragma once

#include <cstdint>

namespace phiquant {

// Pairs are {vertical, horizontal}. channels: of all groups together.
struct Window {
  int64_t height, width, channels, groups;
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  int64_t out(int i) const {
    return ((i == 0 ? height : width) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
  }
  int64_t length() const { return kernel[0] * kernel[1] * channels / groups; }  // of a row, unpadded
};

// x uint8 [images, height, width, channels] -> rows `first` to `first + rows` of the [images out(0) out(1),
// padded(length())] matrix of `group`, each in the order kernel row, kernel column, channel. Outside the image
// stands `outside`: the zero point of x, which is what 0 is coded as.
void im2col(const uint8_t* x, const Window& w, int64_t group, int64_t first, int64_t rows, uint8_t outside, uint8_t* y);

}  // namespace phiquant
