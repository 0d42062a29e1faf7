// Fake-quantize with scales in two levels, found and used while their values are in cache.
#include "core/two_level.h"

#include <algorithm>

#include "ops/blocks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  // block, qmin, qmax, rule, format: of the values; subs: blocks in a super-block; sub_*: of their scales, and how
  // the scale of a super-block is stored. super_scale, float32 [1]: where it is known; for it subs is not used.
  m.def(
      "fake_quantize_two_level_out(Tensor x, int block, int qmin, int qmax, int rule, int format, int subs, int "
      "sub_qmin, int sub_qmax, int sub_rule, int sub_format, int storage, Tensor? super_scale, Tensor(a!) out) -> ()");
}

namespace phiquant {
namespace {

constexpr int64_t kBatch = 2048;  // values that are worked on at a time: with the results they stay in the first cache

void fake_quantize_two_level_out(const Tensor& x, int64_t block, int64_t qmin, int64_t qmax, int64_t rule,
                                 int64_t format, int64_t subs, int64_t sub_qmin, int64_t sub_qmax, int64_t sub_rule,
                                 int64_t sub_format, int64_t storage, const std::optional<Tensor>& super_scale,
                                 Tensor out) {
  const Layout l = layout_of(x, block);
  const TwoLevelSpec spec{range_spec_of(qmin, qmax, rule, 0, format),
                          range_spec_of(sub_qmin, sub_qmax, sub_rule, storage, sub_format), super_scale ? 1 : subs};
  check_same(out, x, "out");
  check(spec.subs > 0 && l.blocks % spec.subs == 0,
        std::to_string(l.blocks) + " blocks are not super-blocks of " + std::to_string(subs) + " each");
  check(spec.subs <= kLongBlock, "a super-block of more than 65536 blocks needs its super_scale");
  const float* known = nullptr;
  if (super_scale) {
    check_float32(*super_scale, "super_scale");
    check(super_scale->numel() == 1, "super_scale must be one value");
    check(spec.block.rule != Rule::minimum, "a known super_scale is for grids without a minimum");
    known = static_cast<const float*>(super_scale->const_data_ptr());
  }
  const void* in = x.const_data_ptr();
  void* y = out.mutable_data_ptr();
  const int64_t length = spec.subs * l.block;
  if (length == 0) return;
  const int64_t batch = std::max<int64_t>(1, kBatch / length);
  torch::stable::parallel_for(0, l.blocks / spec.subs, std::max<int64_t>(1, kGrain / length),
                              [&](int64_t begin, int64_t end) {
                                TwoLevelScales scales(spec);
                                for (int64_t first = begin; first < end; first += batch) {
                                  const Layout part{l.dtype, std::min(batch, end - first) * spec.subs, l.block};
                                  const void* values = shift(in, first * length, l.dtype);
                                  affine_kernels().fake_quantize(values, part, scales.find(values, part, known),
                                                                 spec.block.grid, shift(y, first * length, l.dtype));
                                }
                              });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) {
  m.impl("fake_quantize_two_level_out", TORCH_BOX(&fake_quantize_two_level_out));
}

}  // namespace phiquant
