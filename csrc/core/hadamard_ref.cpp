// The reference: the stages of hadamard.h, a value at a time. Also level `scalar`.
#include "core/hadamard.h"

namespace phiquant {
namespace {

void rotate_row(float* x, const Hadamard& h) {
  const int64_t n = h.base * h.power;
  if (h.signs) {
    for (int64_t i = 0; i < n; ++i) x[i] *= h.signs[i];
  }
  for (int64_t stride = 1; stride < h.power; stride *= 2) {
    for (int64_t start = 0; start < n; start += 2 * stride) {
      for (int64_t i = start; i < start + stride; ++i) {
        const float a = x[i];
        const float b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
    }
  }
  for (int64_t c = 0; c < h.power; ++c) {
    float in[kHadamardBase];
    for (int64_t i = 0; i < h.base; ++i) in[i] = x[i * h.power + c];
    for (int64_t j = 0; j < h.base; ++j) {
      float sum = in[0];
      if (h.base > 1) {
        sum *= h.matrix[j];
        for (int64_t i = 1; i < h.base; ++i) sum += in[i] * h.matrix[i * h.base + j];
      }
      x[j * h.power + c] = sum * h.scale;
    }
  }
}

void rotate(float* x, int64_t rows, const Hadamard& h) {
  for (int64_t row = 0; row < rows; ++row) rotate_row(x + row * h.base * h.power, h);
}

}  // namespace

const HadamardKernels hadamard_ref = {.rotate = rotate};

}  // namespace phiquant
