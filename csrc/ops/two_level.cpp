// Fake-quantize with scales in two levels, found and used while their values are in cache.
#include "core/two_level.h"
#include "core/two_level_search.h"

#include <algorithm>

#include "ops/blocks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  // block, qmin, qmax, rule, format: of the values; subs: blocks in a super-block; sub_*: of their scales, and how
  // the scale of a super-block is stored. super_scale, float32 [1]: where it is known; for it subs is not used.
  m.def(
      "fake_quantize_two_level_out(Tensor x, int block, int qmin, int qmax, int rule, int format, int subs, int "
      "sub_qmin, int sub_qmax, int sub_rule, int sub_format, int storage, Tensor? super_scale, Tensor(a!) out) -> ()");
  // Scales and minimums (codes as float32, one per block) and those of super-blocks, made better in place.
  m.def(
      "refine_two_level(Tensor x, Tensor weights, int block, int qmin, int qmax, int rule, int format, Tensor? levels, "
      "int sub_qmin, int sub_qmax, int storage, int rounds, Tensor(a!) scales, Tensor(b!) super_scales, "
      "Tensor(c!)? minimums, Tensor(d!)? super_minimums) -> ()");
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

float* values_of(const std::optional<Tensor>& t, int64_t expected, const char* name) {
  if (!t) return nullptr;
  check_float32(*t, name);
  check(t->numel() == expected, std::string(name) + " must have " + std::to_string(expected) + " values");
  return static_cast<float*>(t->mutable_data_ptr());
}

void refine_two_level(const Tensor& x, const Tensor& weights, int64_t block, int64_t qmin, int64_t qmax, int64_t rule,
                      int64_t format, const std::optional<Tensor>& levels, int64_t sub_qmin, int64_t sub_qmax,
                      int64_t storage, int64_t rounds, Tensor scales, Tensor super_scales,
                      std::optional<Tensor> minimums, std::optional<Tensor> super_minimums) {
  const Layout l = layout_of(x, block);
  const int64_t supers = super_scales.numel();
  check(supers > 0 && l.blocks % supers == 0, "blocks must be whole super-blocks");
  check(block <= 4096, "a block of more than 4096 values is not refined");
  check(minimums.has_value() == super_minimums.has_value(), "minimums come with their super-block scales");
  check_float32(weights, "weights");
  const int64_t subs = l.blocks / supers;
  check(weights.numel() % (subs * block) == 0 && weights.numel() > 0, "weights come in whole super-blocks");
  const TwoLevelGrid grid{range_spec_of(qmin, qmax, rule, 0, format, levels), static_cast<float>(sub_qmin),
                          static_cast<float>(sub_qmax), static_cast<Storage>(storage), subs};
  const TwoLevelParams all{values_of(scales, l.blocks, "scales"), values_of(minimums, l.blocks, "minimums"),
                           values_of(super_scales, supers, "super_scales"),
                           values_of(super_minimums, supers, "super_minimums")};
  const auto* w = static_cast<const float*>(weights.const_data_ptr());
  const void* in = x.const_data_ptr();
  const int64_t length = subs * block;
  torch::stable::parallel_for(0, supers, std::max<int64_t>(1, kGrain / 64 / length), [&](int64_t begin, int64_t end) {
    const auto from = [&](float* p, int64_t step) { return p ? p + begin * step : nullptr; };
    const TwoLevelParams part{from(all.scales, subs), from(all.minimums, subs), from(all.super_scales, 1),
                              from(all.super_minimums, 1)};
    const Layout some{l.dtype, (end - begin) * subs, block};
    two_level_search_kernels().refine(shift(in, begin * length, l.dtype), some, grid,
                                      {w, weights.numel(), begin * length}, static_cast<int>(rounds), part);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) {
  m.impl("refine_two_level", TORCH_BOX(&refine_two_level));
  m.impl("fake_quantize_two_level_out", TORCH_BOX(&fake_quantize_two_level_out));
}

}  // namespace phiquant
