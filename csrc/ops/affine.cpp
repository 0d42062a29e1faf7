// The affine ops: check, allocate, share the blocks among threads, call core. No arithmetic here.
#include "core/affine.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace phiquant {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Values below which one thread is faster than two (waking a thread costs 10 to 50 microseconds).
constexpr int64_t kGrain = 32 * 1024;
// A block longer than this is cut in pieces, and its range is found in a pass of its own.
constexpr int64_t kLongBlock = 64 * 1024;

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      throw std::invalid_argument(std::string(name) + " must be float32, bfloat16 or float16, but it is " +
                                  torch::headeronly::toString(t.scalar_type()));
  }
}

size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

void check(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

void check_contiguous(const Tensor& t, const char* name) {
  check(t.is_contiguous(), std::string(name) + " must be contiguous; call .contiguous() first");
}

void check_float32(const Tensor& t, const char* name) {
  check(t.scalar_type() == ScalarType::Float, std::string(name) + " must be float32");
  check_contiguous(t, name);
}

void check_same(const Tensor& t, const Tensor& x, const char* name) {
  check_contiguous(t, name);
  check(t.scalar_type() == x.scalar_type() && t.numel() == x.numel(),
        std::string(name) + " must have the dtype and the number of values of x");
}

// x as blocks that share the parameters in `scale`.
Layout layout_of(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& offset, Dtype dtype) {
  check_contiguous(x, "x");
  check_float32(scale, "scale");
  const int64_t blocks = scale.numel();
  if (offset) {
    check_float32(*offset, "offset");
    check(offset->numel() == blocks, "offset must have as many values as scale");
  }
  check(blocks > 0 ? x.numel() % blocks == 0 : x.numel() == 0, "x has " + std::to_string(x.numel()) +
                                                                   " values, which " + std::to_string(blocks) +
                                                                   " scales do not divide into blocks of one size");
  return {dtype, blocks, blocks > 0 ? x.numel() / blocks : 0};
}

Layout layout_of(const Tensor& x, int64_t block) {
  check_contiguous(x, "x");
  check(block > 0 ? x.numel() % block == 0 : x.numel() == 0,
        "x has " + std::to_string(x.numel()) + " values, which blocks of " + std::to_string(block) + " do not divide");
  return {dtype_of(x, "x"), block > 0 ? x.numel() / block : 0, block};
}

BlockParams params_of(const Tensor& scale, const std::optional<Tensor>& offset) {
  return {static_cast<const float*>(scale.const_data_ptr()),
          offset ? static_cast<const float*>(offset->const_data_ptr()) : nullptr};
}

Grid grid_of(int64_t qmin, int64_t qmax, bool minimum) {
  check(-128 <= qmin && qmin < qmax && qmax <= 255 && qmax - qmin <= 255,
        "codes must fit in 8 bits: got qmin " + std::to_string(qmin) + ", qmax " + std::to_string(qmax));
  return {static_cast<float>(qmin), static_cast<float>(qmax), minimum ? Offset::minimum : Offset::zero_point};
}

RangeSpec range_spec_of(int64_t qmin, int64_t qmax, int64_t rule, int64_t storage) {
  check(0 <= rule && rule <= 3, "rule must be 0 to 3");
  check(0 <= storage && storage <= 2, "storage must be 0 to 2");
  const Rule r = static_cast<Rule>(rule);
  check(r != Rule::signed_absmax || qmin < 0, "signed_absmax needs a negative qmin");
  check(r != Rule::absmax || qmax > 0, "absmax needs a positive qmax");
  check(r != Rule::minimum || qmin == 0, "a grid with a minimum needs qmin 0");
  return {grid_of(qmin, qmax, r == Rule::minimum), r, static_cast<Dtype>(storage)};
}

// An output like x. Writing 100 MB of fresh memory costs more in page faults of 4 KiB than the kernels'
// arithmetic does; for large outputs the system is asked for pages of 2 MiB instead.
Tensor output_like(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2u << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(y.mutable_data_ptr()) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end =
      (reinterpret_cast<uintptr_t>(y.mutable_data_ptr()) + y.numel() * y.element_size()) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may fail
#endif
  return y;
}

// A run of values that one thread works on: whole blocks, or a piece of one long block.
struct Piece {
  int64_t block;  // index of the first block
  int64_t start;  // index of the first value
  Layout layout;
};

// Calls f(Piece) for pieces that cover all values, on several threads. Results do not depend on the cut.
template <class F>
void for_pieces(Layout l, const F& f) {
  if (l.blocks == 0 || l.block == 0) return;
  if (l.block <= kLongBlock) {
    const int64_t grain = std::max<int64_t>(1, kGrain / l.block);
    torch::stable::parallel_for(0, l.blocks, grain, [&](int64_t begin, int64_t end) {
      f(Piece{begin, begin * l.block, {l.dtype, end - begin, l.block}});
    });
    return;
  }
  const int64_t pieces = (l.block + kGrain - 1) / kGrain;
  torch::stable::parallel_for(0, l.blocks * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = i % pieces * kGrain;
      const int64_t length = std::min(kGrain, l.block - offset);
      f(Piece{i / pieces, i / pieces * l.block + offset, {l.dtype, 1, length}});
    }
  });
}

template <class T>
T* shift(T* p, int64_t values, Dtype dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(p) + values * static_cast<int64_t>(size_of(dtype));
}

BlockParams shift(BlockParams p, int64_t block) { return {p.scale + block, p.offset ? p.offset + block : nullptr}; }

Tensor quantize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& offset, bool minimum, int64_t qmin,
                int64_t qmax) {
  const Layout l = layout_of(x, scale, offset, dtype_of(x, "x"));
  const Grid grid = grid_of(qmin, qmax, minimum);
  Tensor codes = torch::stable::new_empty(x, x.sizes(), qmin < 0 ? ScalarType::Char : ScalarType::Byte);
  const void* in = x.const_data_ptr();
  auto* out = static_cast<int8_t*>(codes.mutable_data_ptr());
  const BlockParams params = params_of(scale, offset);
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().quantize(shift(in, p.start, l.dtype), p.layout, shift(params, p.block), grid, out + p.start);
  });
  return codes;
}

void dequantize_out(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& offset, bool minimum,
                    Tensor out) {
  const ScalarType type = codes.scalar_type();
  check(type == ScalarType::Char || type == ScalarType::Byte, "codes must be int8 or uint8");
  check_contiguous(out, "out");
  check(out.numel() == codes.numel(), "out must have as many values as codes");
  const Layout l = layout_of(codes, scale, offset, dtype_of(out, "out"));
  const auto* in = static_cast<const int8_t*>(codes.const_data_ptr());
  void* y = out.mutable_data_ptr();
  const BlockParams params = params_of(scale, offset);
  const Offset kind = minimum ? Offset::minimum : Offset::zero_point;
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().dequantize(in + p.start, type == ScalarType::Char, p.layout, shift(params, p.block), kind,
                                shift(y, p.start, l.dtype));
  });
}

void fake_quantize_out(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& offset, bool minimum,
                       int64_t qmin, int64_t qmax, Tensor out) {
  const Layout l = layout_of(x, scale, offset, dtype_of(x, "x"));
  const Grid grid = grid_of(qmin, qmax, minimum);
  check_same(out, x, "out");
  const void* in = x.const_data_ptr();
  void* y = out.mutable_data_ptr();
  const BlockParams params = params_of(scale, offset);
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().fake_quantize(shift(in, p.start, l.dtype), p.layout, shift(params, p.block), grid,
                                   shift(y, p.start, l.dtype));
  });
}

Tensor fake_quantize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& offset, bool minimum,
                     int64_t qmin, int64_t qmax) {
  Tensor y = output_like(x);
  fake_quantize_out(x, scale, offset, minimum, qmin, qmax, y);
  return y;
}

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                              const std::optional<Tensor>& offset, bool minimum, int64_t qmin, int64_t qmax) {
  const Layout l = layout_of(x, scale, offset, dtype_of(x, "x"));
  const Grid grid = grid_of(qmin, qmax, minimum);
  check_same(grad, x, "grad");
  Tensor dx = output_like(x);
  const void* g = grad.const_data_ptr();
  const void* in = x.const_data_ptr();
  void* out = dx.mutable_data_ptr();
  const BlockParams params = params_of(scale, offset);
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().fake_quantize_backward(shift(g, p.start, l.dtype), shift(in, p.start, l.dtype), p.layout,
                                            shift(params, p.block), grid, shift(out, p.start, l.dtype));
  });
  return dx;
}

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
                                              int64_t rule, int64_t storage) {
  check_float32(lo, "lo");
  check_float32(hi, "hi");
  check(lo.numel() == hi.numel(), "lo and hi must have the same number of values");
  Tensor scale = torch::stable::empty_like(lo);
  Tensor offset = torch::stable::empty_like(lo);
  params_from_ranges(static_cast<const float*>(lo.const_data_ptr()), static_cast<const float*>(hi.const_data_ptr()),
                     lo.numel(), range_spec_of(qmin, qmax, rule, storage),
                     static_cast<float*>(scale.mutable_data_ptr()), static_cast<float*>(offset.mutable_data_ptr()));
  return {scale, offset};
}

void find_range(const void* x, Layout l, RangeSpec spec, bool mse, float* scale, float* offset) {
  if (mse) {  // a search reads its block many times: whole blocks to threads, however long
    torch::stable::parallel_for(0, l.blocks, std::max<int64_t>(1, kGrain / 16 / std::max<int64_t>(1, l.block)),
                                [&](int64_t begin, int64_t end) {
                                  affine_kernels().choose_range(shift(x, begin * l.block, l.dtype),
                                                                {l.dtype, end - begin, l.block}, spec, true,
                                                                scale + begin, offset + begin);
                                });
    return;
  }
  std::vector<float> lo(static_cast<size_t>(l.blocks));
  std::vector<float> hi(lo.size());
  find_min_max(x, l, lo.data(), hi.data());
  params_from_ranges(lo.data(), hi.data(), l.blocks, spec, scale, offset);
}

std::tuple<Tensor, Tensor> choose_range(const Tensor& x, int64_t block, int64_t qmin, int64_t qmax, int64_t rule,
                                        int64_t storage, bool mse) {
  const Layout l = layout_of(x, block);
  const RangeSpec spec = range_spec_of(qmin, qmax, rule, storage);
  Tensor scale = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  Tensor offset = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  find_range(x.const_data_ptr(), l, spec, mse, static_cast<float*>(scale.mutable_data_ptr()),
             static_cast<float*>(offset.mutable_data_ptr()));
  return {scale, offset};
}

// codes, scale, offset: the range of each block and the codes on it, in one pass over memory.
std::tuple<Tensor, Tensor, Tensor> quantize_dynamic(const Tensor& x, int64_t block, int64_t qmin, int64_t qmax,
                                                    int64_t rule, int64_t storage) {
  const Layout l = layout_of(x, block);
  const RangeSpec spec = range_spec_of(qmin, qmax, rule, storage);
  Tensor codes = torch::stable::new_empty(x, x.sizes(), qmin < 0 ? ScalarType::Char : ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  Tensor offset = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  const void* in = x.const_data_ptr();
  auto* out = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* s = static_cast<float*>(scale.mutable_data_ptr());
  auto* o = static_cast<float*>(offset.mutable_data_ptr());
  if (l.block > kLongBlock) find_range(in, l, spec, false, s, o);
  for_pieces(l, [&](const Piece& p) {
    const void* values = shift(in, p.start, l.dtype);
    if (l.block > kLongBlock) {  // a piece of a block, whose range is known
      affine_kernels().quantize(values, p.layout, shift(BlockParams{s, o}, p.block), spec.grid, out + p.start);
    } else {
      affine_kernels().quantize_dynamic(values, p.layout, spec, out + p.start, s + p.block, o + p.block);
    }
  });
  return {codes, scale, offset};
}

void fake_quantize_dynamic_out(const Tensor& x, int64_t block, int64_t qmin, int64_t qmax, int64_t rule,
                               int64_t storage, Tensor out) {
  const Layout l = layout_of(x, block);
  const RangeSpec spec = range_spec_of(qmin, qmax, rule, storage);
  check_same(out, x, "out");
  const void* in = x.const_data_ptr();
  void* y = out.mutable_data_ptr();
  if (l.block <= kLongBlock) {
    for_pieces(l, [&](const Piece& p) {
      affine_kernels().fake_quantize_dynamic(shift(in, p.start, l.dtype), p.layout, spec, shift(y, p.start, l.dtype));
    });
    return;
  }
  std::vector<float> scale(static_cast<size_t>(l.blocks));
  std::vector<float> offset(scale.size());
  find_range(in, l, spec, false, scale.data(), offset.data());
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().fake_quantize(shift(in, p.start, l.dtype), p.layout,
                                   shift(BlockParams{scale.data(), offset.data()}, p.block), spec.grid,
                                   shift(y, p.start, l.dtype));
  });
}

Tensor fake_quantize_dynamic(const Tensor& x, int64_t block, int64_t qmin, int64_t qmax, int64_t rule,
                             int64_t storage) {
  Tensor y = output_like(x);
  fake_quantize_dynamic_out(x, block, qmin, qmax, rule, storage, y);
  return y;
}

Tensor fake_quantize_dynamic_backward(const Tensor& grad, const Tensor& x, int64_t block, int64_t qmin, int64_t qmax,
                                      int64_t rule, int64_t storage) {
  const Layout l = layout_of(x, block);
  const RangeSpec spec = range_spec_of(qmin, qmax, rule, storage);
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
  std::vector<float> scale(static_cast<size_t>(l.blocks));
  std::vector<float> offset(scale.size());
  find_range(in, l, spec, false, scale.data(), offset.data());
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().fake_quantize_backward(shift(g, p.start, l.dtype), shift(in, p.start, l.dtype), p.layout,
                                            shift(BlockParams{scale.data(), offset.data()}, p.block), spec.grid,
                                            shift(out, p.start, l.dtype));
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
  m.impl("quantize_dynamic", TORCH_BOX(&quantize_dynamic));
  m.impl("fake_quantize_dynamic", TORCH_BOX(&fake_quantize_dynamic));
  m.impl("fake_quantize_dynamic_out", TORCH_BOX(&fake_quantize_dynamic_out));
  m.impl("fake_quantize_dynamic_backward", TORCH_BOX(&fake_quantize_dynamic_backward));
  m.impl("min_max", TORCH_BOX(&min_max));
  m.impl("choose_range", TORCH_BOX(&choose_range));
  m.impl("range_from_min_max", TORCH_BOX(&range_from_min_max));
}

}  // namespace phiquant
