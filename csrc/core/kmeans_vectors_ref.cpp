// The nearest level of each vector, one at a time.
#include "core/kmeans_vectors.h"

namespace phiquant {
namespace {

void assign(Vectors v, const float* codebook, int64_t k, uint8_t* codes) {
  for (int64_t i = 0; i < v.n; ++i) {
    const float* x = v.x + i * v.dim;
    float least = 0.0f;
    for (int64_t c = 0; c < k; ++c) {
      float distance = 0.0f;
      for (int64_t j = 0; j < v.dim; ++j) {
        const float e = x[j] - codebook[c * v.dim + j];
        distance += e * e;
      }
      if (c == 0 || distance < least) {
        least = distance;
        codes[i] = static_cast<uint8_t>(c);
      }
    }
  }
}

}  // namespace

const VectorKernels vectors_ref = {.assign = assign};

}  // namespace phiquant
