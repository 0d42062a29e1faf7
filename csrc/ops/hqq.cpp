// The op that solves offsets or scales by half-quadratic splitting (core/hqq.h).
#include "core/hqq.h"

#include <algorithm>
#include <optional>

#include "ops/blocks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  m.def(
      "hqq(Tensor x, int block, Tensor(a!) scale, Tensor(b!) offset, int qmin, int qmax, int rule, int storage, "
      "float power, float beta, float kappa, int iterations, int format=0, Tensor? levels=None) -> ()");
}

namespace phiquant {
namespace {

void hqq(const Tensor& x, int64_t block, Tensor scale, Tensor offset, int64_t qmin, int64_t qmax, int64_t rule,
         int64_t storage, double power, double beta, double kappa, int64_t iterations, int64_t format,
         const std::optional<Tensor>& levels) {
  const Layout l = layout_of(x, block);
  const RangeSpec spec = range_spec_of(qmin, qmax, rule, storage, format, levels);
  check(spec.grid.size <= 16, "hqq is for tables of up to 16 levels");
  check(power > 0 && power <= 1, "the power must be above 0 and at most 1");
  check(beta > 0 && kappa > 0 && iterations >= 0, "beta and kappa must be above 0, iterations at least 0");
  check_float32(scale, "scale");
  check_float32(offset, "offset");
  check(scale.numel() == l.blocks && offset.numel() == l.blocks, "scale and offset must have a value for each block");
  const HqqSettings settings{static_cast<float>(power), static_cast<float>(beta), static_cast<float>(kappa),
                             static_cast<int>(iterations)};
  const void* in = x.const_data_ptr();
  auto* s = static_cast<float*>(scale.mutable_data_ptr());
  auto* o = static_cast<float*>(offset.mutable_data_ptr());
  // As in the search: whole blocks to threads, however long; 16 at once lie in lanes.
  const int64_t grain = std::max<int64_t>(1, kGrain / 16 / std::max<int64_t>(1, l.block)) + 15;
  torch::stable::parallel_for(0, l.blocks, l.block > 256 ? 1 : grain, [&](int64_t begin, int64_t end) {
    const Layout part{l.dtype, end - begin, l.block};
    hqq_kernels().solve(shift(in, begin * l.block, l.dtype), part, spec, settings, s + begin, o + begin);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) { m.impl("hqq", TORCH_BOX(&hqq)); }

}  // namespace phiquant
