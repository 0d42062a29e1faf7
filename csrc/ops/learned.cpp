// Fake quantization with gradients for scale and offset (core/learned.h).
#include "core/learned.h"

#include <tuple>
#include <vector>

#include "ops/blocks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  m.def(
      "learned_fake_quantize(Tensor x, Tensor scale, Tensor? offset, bool minimum, int qmin, int qmax, "
      "float gradient_scale) -> Tensor");
  m.def(
      "learned_fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor? offset, bool minimum, int qmin, "
      "int qmax) -> (Tensor, Tensor, Tensor)");
}

namespace phiquant {
namespace {

// The forward pass is that of fake_quantize; gradient_scale is for its backward, joined in Python.
Tensor learned_fake_quantize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& offset, bool minimum,
                             int64_t qmin, int64_t qmax, double) {
  const Layout l = layout_of(x, scale, offset, dtype_of(x, "x"));
  const Grid grid = grid_of(qmin, qmax, minimum, 0, std::nullopt, 1, kRoundedBits);
  Tensor y = output_like(x);
  const void* in = x.const_data_ptr();
  void* out = y.mutable_data_ptr();
  const BlockParams params = params_of(scale, offset);
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().fake_quantize(shift(in, p.start, l.dtype), p.layout, shift(params, p.block), grid,
                                   shift(out, p.start, l.dtype));
  });
  return y;
}

// dx, and float32 [blocks]: the gradient of the scale, and the sum of the gradients of clipped values.
std::tuple<Tensor, Tensor, Tensor> learned_fake_quantize_backward(const Tensor& grad, const Tensor& x,
                                                                  const Tensor& scale,
                                                                  const std::optional<Tensor>& offset, bool minimum,
                                                                  int64_t qmin, int64_t qmax) {
  const Layout l = layout_of(x, scale, offset, dtype_of(x, "x"));
  const Grid grid = grid_of(qmin, qmax, minimum, 0, std::nullopt, 1, kRoundedBits);
  check_same(grad, x, "grad");
  Tensor dx = output_like(x);
  const void* g = grad.const_data_ptr();
  const void* in = x.const_data_ptr();
  void* out = dx.mutable_data_ptr();
  const BlockParams params = params_of(scale, offset);
  const int64_t pieces = l.block > kLongBlock ? (l.block + kGrain - 1) / kGrain : 1;  // as for_pieces cuts
  std::vector<double> scales(static_cast<size_t>(l.blocks * pieces), 0.0);
  std::vector<double> clips(scales.size(), 0.0);
  for_pieces(l, [&](const Piece& p) {
    const auto i = static_cast<size_t>(p.block * pieces + (p.start - p.block * l.block) / kGrain);
    learned_kernels().backward(shift(g, p.start, l.dtype), shift(in, p.start, l.dtype), p.layout,
                               shift(params, p.block), grid, shift(out, p.start, l.dtype), &scales[i], &clips[i]);
  });
  const auto summed = [&](const std::vector<double>& parts) {
    Tensor sums = torch::stable::new_empty(scale, {l.blocks}, ScalarType::Float);
    auto* to = static_cast<float*>(sums.mutable_data_ptr());
    for (int64_t b = 0; b < l.blocks; ++b) {
      double sum = 0.0;
      for (int64_t i = b * pieces; i < (b + 1) * pieces; ++i) sum += parts[static_cast<size_t>(i)];
      to[b] = static_cast<float>(sum);
    }
    return sums;
  };
  return {dx, summed(scales), summed(clips)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) {
  m.impl("learned_fake_quantize", TORCH_BOX(&learned_fake_quantize));
  m.impl("learned_fake_quantize_backward", TORCH_BOX(&learned_fake_quantize_backward));
}

}  // namespace phiquant
