#include "core/two_level.h"

namespace phiquant {

void TwoLevelScales::store(const float* ideal, int64_t blocks, const float* super_scale, float* stored) {
  const AffineKernels& kernels = affine_kernels();
  const Layout whole{Dtype::f32, 1, blocks};
  const Layout supers{Dtype::f32, blocks / spec_.subs, spec_.subs};
  if (super_scale != nullptr) {
    kernels.quantize(ideal, whole, {super_scale, nullptr}, spec_.super.grid, codes_.data());
    kernels.dequantize(codes_.data(), whole, {super_scale, nullptr}, spec_.super.grid, stored);
    return;
  }
  kernels.quantize_dynamic(ideal, supers, spec_.super, codes_.data(), super_.data(), unused_.data());
  kernels.dequantize(codes_.data(), supers, {super_.data(), nullptr}, spec_.super.grid, stored);
}

BlockParams TwoLevelScales::find(const void* x, Layout layout, const float* super_scale) {
  const auto blocks = static_cast<std::size_t>(layout.blocks);
  if (ideal_.size() < blocks) {
    for (auto* buffer : {&ideal_, &scale_, &offset_, &super_, &unused_}) buffer->resize(blocks);
    codes_.resize(blocks);
  }
  const AffineKernels& kernels = affine_kernels();
  if (spec_.block.rule != Rule::minimum) {
    kernels.choose_range(x, layout, spec_.block, ideal_.data(), unused_.data());
    store(ideal_.data(), layout.blocks, super_scale, scale_.data());
    return {scale_.data(), nullptr};
  }
  kernels.min_max(x, layout, offset_.data(), ideal_.data());
  for (std::size_t b = 0; b < blocks; ++b) scale_[b] = offset_[b] < 0.0f ? -offset_[b] : 0.0f;
  store(scale_.data(), layout.blocks, super_scale, offset_.data());
  const float steps = spec_.block.grid.qmax - spec_.block.grid.qmin;
  for (std::size_t b = 0; b < blocks; ++b) {
    offset_[b] = -offset_[b];
    const float scale = (ideal_[b] - offset_[b]) / steps;
    ideal_[b] = scale < 0.0f ? 0.0f : scale;
  }
  store(ideal_.data(), layout.blocks, super_scale, scale_.data());
  return {scale_.data(), offset_.data()};
}

}  // namespace phiquant
