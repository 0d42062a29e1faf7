// The reference: the formula of gptq.h, a column at a time over a tile of rows. Also level `scalar`.
#include <algorithm>

#include "core/affine.h"
#include "core/gptq.h"

namespace phiquant {
namespace {

constexpr int64_t kTile = 64;

void tile(const GptqRun& g, const Grid& grid, int64_t first, int64_t n) {
  const Layout values = {Dtype::f32, n, 1};  // each with parameters of its own
  float errors[kGptqColumns][kTile];
  for (int64_t k = g.columns - 1; k >= 0; --k) {
    float t[kTile];
    const int64_t at = k * g.rows + first;
    std::copy_n(g.target + at, n, t);
    for (int64_t j = g.columns - 1; j > k; --j) {
      const float f = g.feedback[k * g.columns + j];
      for (int64_t i = 0; i < n; ++i) t[i] += f * errors[j][i];
    }
    const int64_t parameters = g.column[k] / g.group * g.rows + first;
    const BlockParams params = {g.scale + parameters, g.offset ? g.offset + parameters : nullptr};
    Grid own = grid;
    if (grid.per_block) own.levels += parameters * grid.size;
    affine_ref.quantize(t, values, params, own, g.codes + g.column[k] * g.rows + first);
    affine_ref.fake_quantize(t, values, params, own, t);
    for (int64_t i = 0; i < n; ++i) errors[k][i] = g.weight[at + i] -= t[i];
  }
}

void run(const GptqRun& g, const Grid& grid, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kTile) tile(g, grid, first, std::min(kTile, end - first));
}

}  // namespace

const GptqKernels gptq_ref = {.run = run};

}  // namespace phiquant
