// The ops that find ranges, alone or on the way to codes and fake-quantized values.
#include <atomic>
#include <limits>
#include <tuple>
#include <vector>

#include "core/affine.h"
#include "ops/blocks.h"

namespace phiquant {
namespace {

// lo, hi of every block; a long block is reduced piece by piece.
void find_min_max(const void* x, Layout l, float* lo, float* hi) {
  if (l.block <= kLongBlock) {
    for_pieces(l, [&](const Piece& p) {
      affine_kernels().min_max(shift(x, p.start, l.dtype), p.layout, lo + p.block, hi + p.block);
    });
    return;
  }
  const int64_t pieces = (l.block + kGrain - 1) / kGrain;
  std::vector<float> lows(static_cast<size_t>(l.blocks * pieces));
  std::vector<float> highs(lows.size());
  for_pieces(l, [&](const Piece& p) {
    const auto i = static_cast<size_t>(p.block * pieces + (p.start - p.block * l.block) / kGrain);
    affine_kernels().min_max(shift(x, p.start, l.dtype), p.layout, &lows[i], &highs[i]);
  });
  const Layout partial{Dtype::f32, l.blocks, pieces};
  std::vector<float> unused(static_cast<size_t>(l.blocks));
  affine_kernels().min_max(lows.data(), partial, lo, unused.data());
  affine_kernels().min_max(highs.data(), partial, unused.data(), hi);
}

std::tuple<Tensor, Tensor> min_max(const Tensor& x, int64_t block) {
  const Layout l = layout_of(x, block);
  Tensor lo = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  Tensor hi = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  find_min_max(x.const_data_ptr(), l, static_cast<float*>(lo.mutable_data_ptr()),
               static_cast<float*>(hi.mutable_data_ptr()));
  return {lo, hi};
}

std::tuple<Tensor, Tensor> range_from_min_max(const Tensor& lo, const Tensor& hi, int64_t qmin, int64_t qmax,
                                              int64_t rule, int64_t storage, int64_t format,
                                              const std::optional<Tensor>& levels) {
  check_float32(lo, "lo");
  check_float32(hi, "hi");
  check(lo.numel() == hi.numel(), "lo and hi must have the same number of values");
  Tensor scale = torch::stable::empty_like(lo);
  Tensor offset = torch::stable::empty_like(lo);
  params_from_ranges(static_cast<const float*>(lo.const_data_ptr()), static_cast<const float*>(hi.const_data_ptr()),
                     lo.numel(), range_spec_of(qmin, qmax, rule, storage, format, levels, kRoundedBits),
                     static_cast<float*>(scale.mutable_data_ptr()), static_cast<float*>(offset.mutable_data_ptr()));
  return {scale, offset};
}

// The means of |x| over every block, of those above above[block] if given; each times `factor`.
std::vector<float> find_means(const void* x, Layout l, const float* above, float factor) {
  const int64_t pieces = l.block > kLongBlock ? (l.block + kGrain - 1) / kGrain : 1;
  std::vector<double> sums(static_cast<size_t>(l.blocks * pieces));
  std::vector<int64_t> counts(sums.size());
  for_pieces(l, [&](const Piece& p) {
    const auto i = static_cast<size_t>(p.block * pieces + (p.start - p.block * l.block) / kGrain);
    affine_kernels().abs_sum(shift(x, p.start, l.dtype), p.layout, above ? above + p.block : nullptr, &sums[i],
                             &counts[i]);
  });
  std::vector<float> means(static_cast<size_t>(l.blocks));
  means_from_sums(sums.data(), counts.data(), l.blocks, pieces, factor, means.data());
  return means;
}

// What Range::parameters takes, for every block: smallest and largest value, or threshold and mean.
void find_statistics(const void* x, Layout l, Rule rule, std::vector<float>& lo, std::vector<float>& hi) {
  lo.assign(static_cast<size_t>(l.blocks), 0.0f);
  hi.assign(lo.size(), 0.0f);
  if (rule == Rule::twn) {
    lo = find_means(x, l, nullptr, kTwnThreshold);
    hi = find_means(x, l, lo.data(), 1.0f);
  } else if (rule == Rule::absmean) {
    hi = find_means(x, l, nullptr, 1.0f);
  } else {
    find_min_max(x, l, lo.data(), hi.data());
  }
}

void find_range(const void* x, Layout l, RangeSpec spec, float* scale, float* offset, float* inverse = nullptr) {
  if (l.block <= kLongBlock && inverse == nullptr) {
    for_pieces(l, [&](const Piece& p) {
      affine_kernels().choose_range(shift(x, p.start, l.dtype), p.layout, spec, scale + p.block, offset + p.block);
    });
    return;
  }
  std::vector<float> lo;
  std::vector<float> hi;
  find_statistics(x, l, spec.rule, lo, hi);
  params_from_ranges(lo.data(), hi.data(), l.blocks, spec, scale, offset, inverse);
}

std::tuple<Tensor, Tensor> choose_range(const Tensor& x, int64_t block, int64_t qmin, int64_t qmax, int64_t rule,
                                        int64_t storage, int64_t format, const std::optional<Tensor>& levels) {
  const Layout l = layout_of(x, block);
  const RangeSpec spec = range_spec_of(qmin, qmax, rule, storage, format, levels, kRoundedBits);
  Tensor scale = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  Tensor offset = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  find_range(x.const_data_ptr(), l, spec, static_cast<float*>(scale.mutable_data_ptr()),
             static_cast<float*>(offset.mutable_data_ptr()));
  return {scale, offset};
}

// codes, scale, offset: the range of each block and the codes on it, in one pass over memory. The scale
// of a block with a value that is not finite is NaN.
std::tuple<Tensor, Tensor, Tensor> quantize_dynamic(const Tensor& x, int64_t block, int64_t qmin, int64_t qmax,
                                                    int64_t rule, int64_t storage, int64_t format,
                                                    const std::optional<Tensor>& levels) {
  const Layout l = layout_of(x, block);
  const RangeSpec spec = range_spec_of(qmin, qmax, rule, storage, format, levels);
  Tensor codes = codes_like(x, qmin);
  Tensor scale = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  Tensor offset = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  const void* in = x.const_data_ptr();
  auto* out = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* s = static_cast<float*>(scale.mutable_data_ptr());
  auto* o = static_cast<float*>(offset.mutable_data_ptr());
  const bool pieces = l.block > kLongBlock;  // then ranges come first, and pieces of blocks are quantized
  std::vector<float> inverse(pieces ? static_cast<size_t>(l.blocks) : 0);
  if (pieces) find_range(in, l, spec, s, o, inverse.data());
  std::vector<std::atomic<bool>> poisoned(inverse.size());
  for_pieces(l, [&](const Piece& p) {
    const void* values = shift(in, p.start, l.dtype);
    if (!pieces) {
      affine_kernels().quantize_dynamic(values, p.layout, spec, out + p.start, s + p.block, o + p.block);
      return;
    }
    const BlockParams params = shift(BlockParams{s, o, inverse.data()}, p.block);
    affine_kernels().quantize(values, p.layout, params, spec.grid, out + p.start);
    if (!affine_kernels().all_finite(values, p.layout)) poisoned[static_cast<size_t>(p.block)] = true;
  });
  for (size_t b = 0; b < poisoned.size(); ++b) {
    if (poisoned[b]) s[b] = std::numeric_limits<float>::quiet_NaN();
  }
  return {codes, scale, offset};
}

// The ranges of all blocks: what long blocks need before their pieces are worked on.
class Ranges {
 public:
  Ranges(const void* x, Layout l, RangeSpec spec)
      : scale_(static_cast<size_t>(l.blocks)), offset_(scale_.size()), inverse_(scale_.size()) {
    find_range(x, l, spec, scale_.data(), offset_.data(), inverse_.data());
  }
  BlockParams from(int64_t block) const {
    return shift(BlockParams{scale_.data(), offset_.data(), inverse_.data()}, block);
  }

 private:
  std::vector<float> scale_;
  std::vector<float> offset_;
  std::vector<float> inverse_;
};

void fake_quantize_dynamic_out(const Tensor& x, int64_t block, int64_t qmin, int64_t qmax, int64_t rule,
                               int64_t storage, Tensor out, int64_t format, const std::optional<Tensor>& levels) {
  const Layout l = layout_of(x, block);
  const RangeSpec spec = range_spec_of(qmin, qmax, rule, storage, format, levels, kRoundedBits);
  check_same(out, x, "out");
  const void* in = x.const_data_ptr();
  void* y = out.mutable_data_ptr();
  if (l.block <= kLongBlock) {
    for_pieces(l, [&](const Piece& p) {
      affine_kernels().fake_quantize_dynamic(shift(in, p.start, l.dtype), p.layout, spec, shift(y, p.start, l.dtype));
    });
    return;
  }
  const Ranges ranges(in, l, spec);
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().fake_quantize(shift(in, p.start, l.dtype), p.layout, ranges.from(p.block), spec.grid,
                                   shift(y, p.start, l.dtype));
  });
}

Tensor fake_quantize_dynamic(const Tensor& x, int64_t block, int64_t qmin, int64_t qmax, int64_t rule, int64_t storage,
                             int64_t format, const std::optional<Tensor>& levels) {
  Tensor y = output_like(x);
  fake_quantize_dynamic_out(x, block, qmin, qmax, rule, storage, y, format, levels);
  return y;
}

Tensor fake_quantize_dynamic_backward(const Tensor& grad, const Tensor& x, int64_t block, int64_t qmin, int64_t qmax,
                                      int64_t rule, int64_t storage, int64_t format,
                                      const std::optional<Tensor>& levels) {
  const Layout l = layout_of(x, block);
  const RangeSpec spec = range_spec_of(qmin, qmax, rule, storage, format, levels, kRoundedBits);
  check_same(grad, x, "grad");
  Tensor dx = output_like(x);
  const void* g = grad.const_data_ptr();
  const void* in = x.const_data_ptr();
  void* out = dx.mutable_data_ptr();
  if (l.block <= kLongBlock) {
    for_pieces(l, [&](const Piece& p) {
      affine_kernels().fake_quantize_dynamic_backward(shift(g, p.start, l.dtype), shift(in, p.start, l.dtype), p.layout,
                                                      spec, shift(out, p.start, l.dtype));
    });
    return dx;
  }
  const Ranges ranges(in, l, spec);
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().fake_quantize_backward(shift(g, p.start, l.dtype), shift(in, p.start, l.dtype), p.layout,
                                            ranges.from(p.block), spec.grid, shift(out, p.start, l.dtype));
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) {
  m.impl("quantize_dynamic", TORCH_BOX(&quantize_dynamic));
  m.impl("fake_quantize_dynamic", TORCH_BOX(&fake_quantize_dynamic));
  m.impl("fake_quantize_dynamic_out", TORCH_BOX(&fake_quantize_dynamic_out));
  m.impl("fake_quantize_dynamic_backward", TORCH_BOX(&fake_quantize_dynamic_backward));
  m.impl("min_max", TORCH_BOX(&min_max));
  m.impl("choose_range", TORCH_BOX(&choose_range));
  m.impl("range_from_min_max", TORCH_BOX(&range_from_min_max));
}

}  // namespace phiquant
