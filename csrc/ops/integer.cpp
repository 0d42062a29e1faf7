// Integer arithmetic on codes: check, allocate, share the work among threads, call core. No arithmetic here.
//
// x: uint8 or int8 codes, contiguous, [M, K] or for convolutions [B, H, W, C]; x_zero their zero point. packed,
// w_sums: what pack_weight makes of int8 codes [N, K]; w_zero int32 [N] where these have zero points. bias: int32
// [N], in units of the product of both scales. multiplier, shift: int32 [N], from quantize_multiplier. The sums
//     sum over k of (x - x_zero)(w - w_zero) + bias
// are returned as int32, as codes of a grid with zero_point, qmin, qmax, or as floats (dtype: 0 float32, 1 bfloat16,
// 2 float16) on the scales x_scale [M], w_scale [N] and a float bias; there x_zero has a value for each row.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "core/gemm.h"
#include "core/im2col.h"
#include "ops/blocks.h"

namespace phiquant {

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  m.def("quantize_multiplier(Tensor real) -> (Tensor, Tensor)");
  m.def("requantize(Tensor sums, Tensor multiplier, Tensor shift, int zero_point, int qmin, int qmax) -> Tensor");
  m.def("pack_weight(Tensor codes) -> (Tensor, Tensor)");
  m.def("linear_sums(Tensor x, int x_zero, Tensor packed, Tensor w_sums, Tensor? w_zero, Tensor? bias) -> Tensor");
  m.def(
      "linear_codes(Tensor x, int x_zero, Tensor packed, Tensor w_sums, Tensor? w_zero, Tensor? bias, "
      "Tensor multiplier, Tensor shift, int zero_point, int qmin, int qmax) -> Tensor");
  m.def(
      "linear_floats(Tensor x, Tensor x_scale, Tensor? x_zero, Tensor packed, Tensor w_sums, Tensor w_scale, "
      "Tensor? bias, int dtype) -> Tensor");
  m.def(
      "conv2d_codes(Tensor x, int x_zero, Tensor packed, Tensor w_sums, Tensor? w_zero, Tensor? bias, "
      "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
      "Tensor multiplier, Tensor shift, int zero_point, int qmin, int qmax) -> Tensor");
}

namespace {

constexpr int64_t kRowBlock = 192;      // rows a thread works on at a time: whole tiles at every level
constexpr int64_t kProducts = 1 << 20;  // products below which one thread is faster than two

const int32_t* int32s(const Tensor& t, int64_t n, const char* name) {
  check(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == n,
        std::string(name) + " must be contiguous int32 with " + std::to_string(n) + " values");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

const int32_t* int32s(const std::optional<Tensor>& t, int64_t n, const char* name) {
  return t ? int32s(*t, n, name) : nullptr;
}

const float* floats(const Tensor& t, int64_t n, const char* name) {
  check_float32(t, name);
  check(t.numel() == n, std::string(name) + " must have " + std::to_string(n) + " values");
  return static_cast<const float*>(t.const_data_ptr());
}

// Codes as uint8 rows that the kernels can read: x itself where it is that already.
struct Rows {
  const uint8_t* data;
  int64_t rows, k;  // k unpadded
  int64_t flip;     // 128 for int8 codes: how much higher uint8 codes and their zero point are
  std::vector<uint8_t> own;

  Rows(const Tensor& x, int64_t rows_, int64_t k_) : rows(rows_), k(k_) {
    const ScalarType type = x.scalar_type();
    check(type == ScalarType::Byte || type == ScalarType::Char, "x must be uint8 or int8 codes");
    check_contiguous(x, "x");
    data = static_cast<const uint8_t*>(x.const_data_ptr());
    flip = type == ScalarType::Char ? 128 : 0;
    if (flip != 0 || k % kQuad != 0) {
      own.resize(static_cast<size_t>(rows * padded(k)));
      pad_rows(data, flip != 0, rows, k, own.data());
      data = own.data();
    }
  }
};

int32_t zero_point_of(int64_t zero_point, const char* name) {
  check(-256 <= zero_point && zero_point <= 255, std::string(name) + " must be -256 to 255");
  return static_cast<int32_t>(zero_point);
}

// The weights of a layer: `groups` products of n columns each, and what is added to the sums of each column.
struct Weights {
  const int8_t* packed;
  int64_t n, groups;
  const int32_t* zero;
  std::vector<int32_t> column;

  Weights(const Tensor& t, const Tensor& sums, const std::optional<Tensor>& w_zero, const std::optional<Tensor>& bias,
          int64_t x_zero, int64_t k, int64_t groups_)
      : groups(groups_) {
    const int64_t all = sums.numel();
    check(groups > 0 && all % groups == 0, "groups must divide the number of output channels");
    n = all / groups;
    check(t.scalar_type() == ScalarType::Char && t.is_contiguous() &&
              t.numel() == groups * panels(n) * kPanel * padded(k),
          "packed does not hold weights of " + std::to_string(all) + " rows of " + std::to_string(k) +
              " codes; make it by pack_weight");
    packed = static_cast<const int8_t*>(t.const_data_ptr());
    zero = int32s(w_zero, all, "w_zero");
    column.resize(static_cast<size_t>(all));
    fold_zero_point(int32s(bias, all, "bias"), int32s(sums, all, "w_sums"), zero, static_cast<int32_t>(x_zero), all, k,
                    column.data());
  }

  Gemm product(const uint8_t* x, int64_t rows, int64_t k, int64_t group, const int32_t* row) const {
    return {x,         rows,
            padded(k), packed + group * panels(n) * kPanel * padded(k),
            n,         column.data() + group * n,
            row,       zero ? zero + group * n : nullptr};
  }
};

Requantize requantize_of(const Tensor& multiplier, const Tensor& shift, int64_t n, int64_t zero_point, int64_t qmin,
                         int64_t qmax) {
  check(-128 <= qmin && qmin <= qmax && qmax <= 255 && qmax - qmin <= 255,
        "codes must fit in 8 bits: got qmin " + std::to_string(qmin) + ", qmax " + std::to_string(qmax));
  const int32_t* m = int32s(multiplier, n, "multiplier");
  const int32_t* s = int32s(shift, n, "shift");
  for (int64_t i = 0; i < n; ++i) {
    check(m[i] >= 0 && -30 <= s[i] && s[i] <= 31, "multiplier and shift must be what quantize_multiplier makes");
  }
  return {m, s, zero_point_of(zero_point, "zero_point"), static_cast<int32_t>(qmin), static_cast<int32_t>(qmax)};
}

Requantize shifted(Requantize r, int64_t n) { return {r.multiplier + n, r.shift + n, r.zero_point, r.qmin, r.qmax}; }

int64_t columns_of(const Tensor& x, int64_t axis) {
  check(x.dim() == axis + 1, "x must have " + std::to_string(axis + 1) + " dimensions");
  return x.size(axis);
}

// Calls f(part of g, first row, first column) for parts that cover g, on several threads. A thread
// takes the columns in order: their packed weights stay in its cache while the rows pass by.
template <class F>
void for_parts(const Gemm& g, const F& f) {
  const int64_t width = gemm_kernels().columns;
  const int64_t blocks = (g.rows + kRowBlock - 1) / kRowBlock;
  const int64_t parts = blocks * ((g.n + width - 1) / width);
  const int64_t grain = std::max<int64_t>(1, kProducts / std::max<int64_t>(1, kRowBlock * width * g.k));
  torch::stable::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i % blocks * kRowBlock;
      const int64_t n = i / blocks * width;
      f(Gemm{g.x + m * g.k, std::min(kRowBlock, g.rows - m), g.k, g.packed + n * g.k, std::min(width, g.n - n),
             g.column + n, g.row ? g.row + m : nullptr, g.factor ? g.factor + n : nullptr},
        m, n);
    }
  });
}

// The product of a linear layer, with the sums of x's rows where the weights have zero points.
struct Linear {
  Rows x;
  Weights w;
  std::vector<int32_t> row;

  Linear(const Tensor& codes, int64_t x_zero, const Tensor& packed, const Tensor& w_sums,
         const std::optional<Tensor>& w_zero, const std::optional<Tensor>& bias)
      : x(codes, codes.dim() > 0 ? codes.size(0) : 0, columns_of(codes, 1)),
        w(packed, w_sums, w_zero, bias, zero_point_of(x_zero, "x_zero") + x.flip, x.k, 1) {
    if (w.zero) {
      row.resize(static_cast<size_t>(x.rows));
      row_sums(x.data, x.rows, x.k, row.data());
    }
  }
  Gemm product() const { return w.product(x.data, x.rows, x.k, 0, w.zero ? row.data() : nullptr); }
};

Tensor linear_sums(const Tensor& x, int64_t x_zero, const Tensor& packed, const Tensor& w_sums,
                   const std::optional<Tensor>& w_zero, const std::optional<Tensor>& bias) {
  const Linear linear(x, x_zero, packed, w_sums, w_zero, bias);
  const int64_t n = linear.w.n;
  Tensor y = torch::stable::new_empty(x, {linear.x.rows, n}, ScalarType::Int);
  auto* out = static_cast<int32_t*>(y.mutable_data_ptr());
  for_parts(linear.product(),
            [&](const Gemm& g, int64_t row, int64_t column) { gemm_kernels().sums(g, out + row * n + column, n); });
  return y;
}

Tensor linear_codes(const Tensor& x, int64_t x_zero, const Tensor& packed, const Tensor& w_sums,
                    const std::optional<Tensor>& w_zero, const std::optional<Tensor>& bias, const Tensor& multiplier,
                    const Tensor& shift, int64_t zero_point, int64_t qmin, int64_t qmax) {
  const Linear linear(x, x_zero, packed, w_sums, w_zero, bias);
  const int64_t n = linear.w.n;
  const Requantize r = requantize_of(multiplier, shift, n, zero_point, qmin, qmax);
  Tensor y = torch::stable::new_empty(x, {linear.x.rows, n}, qmin < 0 ? ScalarType::Char : ScalarType::Byte);
  auto* out = static_cast<uint8_t*>(y.mutable_data_ptr());
  for_parts(linear.product(), [&](const Gemm& g, int64_t row, int64_t column) {
    gemm_kernels().codes(g, shifted(r, column), out + row * n + column, n);
  });
  return y;
}

Tensor linear_floats(const Tensor& x, const Tensor& x_scale, const std::optional<Tensor>& x_zero, const Tensor& packed,
                     const Tensor& w_sums, const Tensor& w_scale, const std::optional<Tensor>& bias, int64_t dtype) {
  check(0 <= dtype && dtype <= 2, "dtype must be 0 to 2");
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  const Linear linear(x, 0, packed, w_sums, std::nullopt, std::nullopt);
  const int64_t n = linear.w.n;
  const Rescale r{floats(x_scale, linear.x.rows, "x_scale"), floats(w_scale, n, "w_scale"),
                  bias ? floats(*bias, n, "bias") : nullptr, static_cast<Dtype>(dtype)};
  Gemm product = linear.product();
  if (x_zero) {
    product.row = int32s(*x_zero, linear.x.rows, "x_zero");
    product.factor = int32s(w_sums, n, "w_sums");
  }
  Tensor y = torch::stable::new_empty(x, {linear.x.rows, n}, types[dtype]);
  void* out = y.mutable_data_ptr();
  for_parts(product, [&](const Gemm& g, int64_t row, int64_t column) {
    gemm_kernels().floats(g, {r.row_scale + row, r.column_scale + column, r.bias ? r.bias + column : nullptr, r.dtype},
                          shift(out, row * n + column, r.dtype), n);
  });
  return y;
}

Window window_of(const Tensor& x, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  Window w{x.size(1), x.size(2), x.size(3), groups, {}, {}, {}, {}};
  check(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
        "kernel, stride, padding and dilation are pairs: {vertical, horizontal}");
  check(groups > 0 && w.channels % groups == 0, "groups must divide the number of input channels");
  for (size_t i = 0; i < 2; ++i) {
    check(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0,
          "kernel, stride and dilation must be at least 1, padding at least 0");
    w.kernel[i] = kernel[i];
    w.stride[i] = stride[i];
    w.padding[i] = padding[i];
    w.dilation[i] = dilation[i];
    check((i == 0 ? w.height : w.width) + 2 * padding[i] >= dilation[i] * (kernel[i] - 1) + 1,
          "the kernel is larger than the padded image");
  }
  return w;
}

Tensor conv2d_codes(const Tensor& x, int64_t x_zero, const Tensor& packed, const Tensor& w_sums,
                    const std::optional<Tensor>& w_zero, const std::optional<Tensor>& bias, std::vector<int64_t> kernel,
                    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                    int64_t groups, const Tensor& multiplier, const Tensor& shift, int64_t zero_point, int64_t qmin,
                    int64_t qmax) {
  columns_of(x, 3);
  const Window window = window_of(x, kernel, stride, padding, dilation, groups);
  const Rows codes(x, 1, x.numel());
  const int64_t zero = zero_point_of(x_zero, "x_zero") + codes.flip;
  check(0 <= zero && zero <= 255, "x_zero must be a code of x: outside the image stand such codes");
  const int64_t k = window.length();
  const Weights w(packed, w_sums, w_zero, bias, zero, k, groups);
  const int64_t all = w.n * groups;
  const Requantize r = requantize_of(multiplier, shift, all, zero_point, qmin, qmax);
  const int64_t rows = x.size(0) * window.out(0) * window.out(1);
  Tensor y = torch::stable::new_empty(x, {x.size(0), window.out(0), window.out(1), all},
                                      qmin < 0 ? ScalarType::Char : ScalarType::Byte);
  auto* out = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  const int64_t grain = std::max<int64_t>(1, kProducts / std::max<int64_t>(1, kRowBlock * all * k));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> matrix(static_cast<size_t>(kRowBlock * padded(k)));
    std::vector<int32_t> row(w.zero ? kRowBlock : 0);
    for (int64_t first = begin * kRowBlock; first < std::min(end * kRowBlock, rows); first += kRowBlock) {
      const int64_t count = std::min(kRowBlock, rows - first);
      for (int64_t group = 0; group < groups; ++group) {
        im2col(codes.data, window, group, first, count, static_cast<uint8_t>(zero), matrix.data());
        if (w.zero) row_sums(matrix.data(), count, k, row.data());
        gemm_kernels().codes(w.product(matrix.data(), count, k, group, w.zero ? row.data() : nullptr),
                             shifted(r, group * w.n), out + first * all + group * w.n, all);
      }
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> pack(const Tensor& codes) {
  check(codes.scalar_type() == ScalarType::Char && codes.dim() == 2, "codes must be int8 [N, K]");
  check_contiguous(codes, "codes");
  const int64_t n = codes.size(0);
  const int64_t k = codes.size(1);
  Tensor packed = torch::stable::new_empty(codes, {panels(n), padded(k) / kQuad, kPanel, kQuad}, ScalarType::Char);
  Tensor sums = torch::stable::new_empty(codes, {n}, ScalarType::Int);
  pack_weight(static_cast<const int8_t*>(codes.const_data_ptr()), n, k, static_cast<int8_t*>(packed.mutable_data_ptr()),
              static_cast<int32_t*>(sums.mutable_data_ptr()));
  return {packed, sums};
}

std::tuple<Tensor, Tensor> multipliers(const Tensor& real) {
  check(real.scalar_type() == ScalarType::Double, "real must be float64");
  check_contiguous(real, "real");
  Tensor multiplier = torch::stable::new_empty(real, real.sizes(), ScalarType::Int);
  Tensor shift = torch::stable::new_empty(real, real.sizes(), ScalarType::Int);
  const auto* in = static_cast<const double*>(real.const_data_ptr());
  for (int64_t i = 0; i < real.numel(); ++i) {
    check(in[i] >= 0 && in[i] - in[i] == 0,
          "a multiplier must be finite and >= 0, but value " + std::to_string(i) + " is " + std::to_string(in[i]));
    const Multiplier m = quantize_multiplier(in[i]);
    static_cast<int32_t*>(multiplier.mutable_data_ptr())[i] = m.multiplier;
    static_cast<int32_t*>(shift.mutable_data_ptr())[i] = m.shift;
  }
  return {multiplier, shift};
}

Tensor requantize(const Tensor& sums, const Tensor& multiplier, const Tensor& shift, int64_t zero_point, int64_t qmin,
                  int64_t qmax) {
  const int64_t n = columns_of(sums, 1);
  const int64_t rows = sums.size(0);
  const int32_t* in = int32s(sums, rows * n, "sums");
  const Requantize r = requantize_of(multiplier, shift, n, zero_point, qmin, qmax);
  Tensor y = codes_like(sums, qmin);
  auto* out = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    gemm_kernels().requantize(in + begin * n, end - begin, n, r, out + begin * n);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) {
  m.impl("quantize_multiplier", TORCH_BOX(&multipliers));
  m.impl("requantize", TORCH_BOX(&requantize));
  m.impl("pack_weight", TORCH_BOX(&pack));
  m.impl("linear_sums", TORCH_BOX(&linear_sums));
  m.impl("linear_codes", TORCH_BOX(&linear_codes));
  m.impl("linear_floats", TORCH_BOX(&linear_floats));
  m.impl("conv2d_codes", TORCH_BOX(&conv2d_codes));
}

}  // namespace phiquant
