// Random Hadamard rotations of rows: y = x diag(signs) (B kron S) * scale, in place.
//
// S is the Hadamard matrix of order p = 2^k in Sylvester's order, by k stages of butterflies; B one of order m, its
// entries 1 and -1, multiplied as it is: m additions a value, against k for S. n = m p: 3072 = 12 * 256,
// 5120 = 20 * 256, 17920 = 140 * 128. With scale = 1 / sqrt(n) the rotation is orthogonal.
#pragma once

#include <cstdint>

namespace phiquant {

constexpr int64_t kHadamardBase = 256;  // the largest m: m vectors of a column block stay in the L1 cache

// fp32. Stages from stride 1 up, then B's columns in order, then the scale, so that every CPU level gives the same
// bits.
struct Hadamard {
  int64_t base;         // m <= kHadamardBase
  int64_t power;        // p
  const float* matrix;  // [m, m], value j of a row gets sum_i x_i matrix[i][j]; not read if m = 1
  const float* signs;   // [n] 1 and -1, or null
  float scale;
};

struct HadamardKernels {
  void (*rotate)(float* x, int64_t rows, const Hadamard& h);  // x [rows, n]
};

// The kernels of the current CPU level (core/cpu.h).
const HadamardKernels& hadamard_kernels();

extern const HadamardKernels hadamard_ref;
extern const HadamardKernels hadamard_avx2;
extern const HadamardKernels hadamard_avx512;

}  // namespace phiquant
