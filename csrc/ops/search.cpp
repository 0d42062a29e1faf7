// The op that searches the range of least squared error (core/search.h).
#include "core/search.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "ops/blocks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  m.def(
      "search_range(Tensor x, int block, int qmin, int qmax, int rule, int storage, bool exact, "
      "int format=0, Tensor? levels=None, Tensor? weights=None) -> (Tensor, Tensor)");
}

namespace phiquant {
namespace {

std::tuple<Tensor, Tensor> search_range(const Tensor& x, int64_t block, int64_t qmin, int64_t qmax, int64_t rule,
                                        int64_t storage, bool exact, int64_t format,
                                        const std::optional<Tensor>& levels, const std::optional<Tensor>& weights) {
  check(0 <= rule && rule <= 3, "the search knows rules 0 to 3");
  const Layout l = layout_of(x, block);
  const RangeSpec spec = range_spec_of(qmin, qmax, rule, storage, format, levels);
  check(format == 0 || !exact, "the exact search is for integers");
  check(spec.grid.size <= 16, "the search is for tables of up to 16 levels");
  Weights known;
  if (weights) {
    check(weights->scalar_type() == ScalarType::Float && weights->is_contiguous(), "weights are contiguous float32");
    check(!exact, "the exact search takes no weights");
    known.values = static_cast<const float*>(weights->const_data_ptr());
    known.columns = weights->numel();
    check(l.block == 0 || known.columns % l.block == 0, "weights come in whole blocks");
    check(known.columns > 0 || x.numel() == 0, "weights are given but empty");
  }
  Tensor scale = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  Tensor offset = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  const void* in = x.const_data_ptr();
  auto* s = static_cast<float*>(scale.mutable_data_ptr());
  auto* o = static_cast<float*>(offset.mutable_data_ptr());
  // A search reads its block many times: whole blocks to threads, however long; 16 at once lie in lanes.
  const int64_t grain = std::max<int64_t>(1, kGrain / 16 / std::max<int64_t>(1, l.block)) + 15;
  torch::stable::parallel_for(0, l.blocks, l.block > 256 ? 1 : grain, [&](int64_t begin, int64_t end) {
    const Layout part{l.dtype, end - begin, l.block};
    Weights from = known;
    from.first = begin * l.block;
    search_kernels().search(shift(in, begin * l.block, l.dtype), part, spec, exact, from, s + begin, o + begin);
  });
  return {scale, offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) { m.impl("search_range", TORCH_BOX(&search_range)); }

}  // namespace phiquant
