// GPTQ's inner step: codes for a run of columns, each column making up for the errors of those before it.
//
// GPTQ chooses codes Q that make |(W - Q) X|^2 = tr((W - Q) H (W - Q)^T) small, H = X X^T. With H = L L^T, L
// lower triangular, and the feedback F[k][j] = L[j][k] / L[k][k], the columns are taken from the last to the first:
//     t_k = w_k + sum_{j > k} F[k][j] (w_j - q_j),     q_k = the value of the nearest code to t_k.
// These are the codes of the paper (arXiv 2210.17323, which inverts H and goes from the first to the last); that no
// inverse is needed is shown in arXiv 2307.13304. Matrices lie transposed, a row of W along a lane: rows are
// independent.
//
// Legend: C columns in the run, K of W, N rows of W, G groups of K / G columns that share a scale.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace phiquant {

constexpr int64_t kGptqColumns = 128;  // most columns in a run: a tile of their errors stays in the L1 cache

// fp32 unless said. The sum of `target` and the feedback is taken in the order of the columns, without
// fused multiply-add, so that every CPU level gives the same bits.
struct GptqRun {
  int64_t columns;        // C <= kGptqColumns
  int64_t rows;           // N
  int64_t group;          // K / G
  const float* target;    // [C, N] w_k and the feedback of all columns after this run
  float* weight;          // [C, N] w_k; overwritten by the error w_k - q_k
  const float* feedback;  // [C, C] F, used above the diagonal
  const int64_t* column;  // [C] the place in W of each column
  const float* scale;     // [G, N] as stored
  const float* offset;    // [G, N] or null: all zero
  int8_t* codes;          // [K, N], of which the rows `column` are written
};

// `run` works on rows begin <= n < end. Codes are those of core/affine.h, of any format. A table of levels is the same
// for all, or where grid.per_block, one for each scale: levels [G, N, size].
struct GptqKernels {
  void (*run)(const GptqRun& run, const Grid& grid, int64_t begin, int64_t end);
};

// The kernels of the current CPU level (core/cpu.h).
const GptqKernels& gptq_kernels();

extern const GptqKernels gptq_ref;
extern const GptqKernels gptq_avx2;
extern const GptqKernels gptq_avx512;

}  // namespace phiquant
