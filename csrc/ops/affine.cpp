// Encode, decode and fake-quantize on given parameters: check, allocate, share the blocks among threads,
// call core. No arithmetic here.
#include "core/affine.h"

#include "ops/blocks.h"

namespace phiquant {
namespace {

Tensor quantize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& offset, bool minimum, int64_t qmin,
                int64_t qmax, int64_t format, const std::optional<Tensor>& levels) {
  const Layout l = layout_of(x, scale, offset, dtype_of(x, "x"));
  const Grid grid = grid_of(qmin, qmax, minimum, format, levels, l.blocks);
  Tensor codes = codes_like(x, qmin);
  const void* in = x.const_data_ptr();
  auto* out = static_cast<int8_t*>(codes.mutable_data_ptr());
  const BlockParams params = params_of(scale, offset);
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().quantize(shift(in, p.start, l.dtype), p.layout, shift(params, p.block), shift(grid, p.block),
                              out + p.start);
  });
  return codes;
}

void dequantize_out(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset, bool minimum,
                    Tensor out, int64_t format, const std::optional<Tensor>& levels) {
  const ScalarType type = codes.scalar_type();
  check(type == ScalarType::Char || type == ScalarType::Byte, "codes must be int8 or uint8");
  check_contiguous(out, "out");
  check(out.numel() == codes.numel(), "out must have as many values as codes");
  const Layout l = layout_of(codes, scale, offset, dtype_of(out, "out"));
  const auto* in = static_cast<const int8_t*>(codes.const_data_ptr());
  void* y = out.mutable_data_ptr();
  const BlockParams params = params_of(scale, offset);
  const bool code_signed = type == ScalarType::Char;
  const Grid grid = grid_of(code_signed ? -128 : 0, code_signed ? 127 : 255, minimum, format, levels, l.blocks);
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().dequantize(in + p.start, p.layout, shift(params, p.block), shift(grid, p.block),
                                shift(y, p.start, l.dtype));
  });
}

void fake_quantize_out(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& offset, bool minimum,
                       int64_t qmin, int64_t qmax, Tensor out, int64_t format, const std::optional<Tensor>& levels) {
  const Layout l = layout_of(x, scale, offset, dtype_of(x, "x"));
  const Grid grid = grid_of(qmin, qmax, minimum, format, levels, l.blocks, kRoundedBits);
  check_same(out, x, "out");
  const void* in = x.const_data_ptr();
  void* y = out.mutable_data_ptr();
  const BlockParams params = params_of(scale, offset);
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().fake_quantize(shift(in, p.start, l.dtype), p.layout, shift(params, p.block), shift(grid, p.block),
                                   shift(y, p.start, l.dtype));
  });
}

Tensor fake_quantize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& offset, bool minimum,
                     int64_t qmin, int64_t qmax, int64_t format, const std::optional<Tensor>& levels) {
  Tensor y = output_like(x);
  fake_quantize_out(x, scale, offset, minimum, qmin, qmax, y, format, levels);
  return y;
}

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                              const std::optional<Tensor>& offset, bool minimum, int64_t qmin, int64_t qmax,
                              int64_t format, const std::optional<Tensor>& levels) {
  const Layout l = layout_of(x, scale, offset, dtype_of(x, "x"));
  const Grid grid = grid_of(qmin, qmax, minimum, format, levels, l.blocks, kRoundedBits);
  check_same(grad, x, "grad");
  Tensor dx = output_like(x);
  const void* g = grad.const_data_ptr();
  const void* in = x.const_data_ptr();
  void* out = dx.mutable_data_ptr();
  const BlockParams params = params_of(scale, offset);
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().fake_quantize_backward(shift(g, p.start, l.dtype), shift(in, p.start, l.dtype), p.layout,
                                            shift(params, p.block), shift(grid, p.block), shift(out, p.start, l.dtype));
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize_out", TORCH_BOX(&dequantize_out));
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  m.impl("fake_quantize_out", TORCH_BOX(&fake_quantize_out));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
}

}  // namespace phiquant
