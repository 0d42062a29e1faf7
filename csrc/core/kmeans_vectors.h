// k-means of short vectors: x [n, dim] float32, dim 2 or 4, codebook [k, dim], k up to 256, a uint8 code for each
// vector.
//
// Lloyd's algorithm from k-means++; a local optimum. Distances are sums of squared differences in fp32, in the order of
// the components; of equally near levels the first is taken. Same bits at every CPU level, on any number of threads.
#pragma once

#include <cstdint>

#include "core/kmeans.h"

namespace phiquant {

struct Vectors {
  const float* x;
  int64_t n;
  int64_t dim;
};

// The kernel of one CPU level.
struct VectorKernels {
  // codes[i] = the level nearest to vector i
  void (*assign)(Vectors v, const float* codebook, int64_t k, uint8_t* codes);
};

extern const VectorKernels vectors_ref;
extern const VectorKernels vectors_avx2;
extern const VectorKernels vectors_avx512;
const VectorKernels& vector_kernels();

struct VectorOptions {
  uint64_t seed;
  int64_t iterations;  // at most
};

// weights: one for each vector, or null. A level without vectors stays where it is.
void kmeans_vectors(Vectors v, const float* weights, int64_t k, VectorOptions options, float* codebook, uint8_t* codes,
                    const Parallel& parallel);

}  // namespace phiquant
