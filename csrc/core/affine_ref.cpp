// The reference kernels: the formulas, one value at a time. Also what runs at level `scalar`.
#include <cmath>
#include <limits>

#include "core/affine.h"
#include "core/half.h"
#include "core/range.inl"

namespace phiquant {
namespace {

struct Store {
  static float round_f16(float v) { return to_float(from_float<f16>(v)); }
  static float round_bf16(float v) { return to_float(from_float<bf16>(v)); }
};

// qmin where v is NaN, as the vector instructions have it.
inline float clamp(float v, float lo, float hi) { return Range<Lane<Store>>::clamp(v, lo, hi); }

// The value on the grid's scale, rounded but not clamped: what the mask looks at.
inline float unclamped(float x, Params p, float inv, Offset offset) {
  return offset == Offset::minimum ? std::nearbyint((x - p.offset) * inv) : std::nearbyint(x * inv) + p.offset;
}

inline float decode(float q, Params p, Offset offset) {
  return offset == Offset::minimum ? p.scale * q + p.offset : p.scale * (q - p.offset);
}

inline Params at(BlockParams params, int64_t b) { return {params.scale[b], params.offset ? params.offset[b] : 0.0f}; }

template <class T>
void quantize_block(const T* x, int64_t n, Params p, Grid grid, int8_t* codes) {
  const float inv = inverse<Store>(p.scale);
  for (int64_t i = 0; i < n; ++i) {
    const float q = clamp(unclamped(to_float(x[i]), p, inv, grid.offset), grid.qmin, grid.qmax);
    codes[i] = static_cast<int8_t>(static_cast<int>(q));
  }
}

template <class T>
void fake_quantize_block(const T* x, int64_t n, Params p, Grid grid, T* y) {
  const float inv = inverse<Store>(p.scale);
  for (int64_t i = 0; i < n; ++i) {
    const float q = clamp(unclamped(to_float(x[i]), p, inv, grid.offset), grid.qmin, grid.qmax);
    y[i] = from_float<T>(decode(q, p, grid.offset));
  }
}

template <class T>
void backward_block(const T* grad, const T* x, int64_t n, Params p, Grid grid, T* dx) {
  const float inv = inverse<Store>(p.scale);
  for (int64_t i = 0; i < n; ++i) {
    const float v = unclamped(to_float(x[i]), p, inv, grid.offset);
    dx[i] = v >= grid.qmin && v <= grid.qmax ? grad[i] : from_float<T>(0.0f);
  }
}

template <class T>
bool all_finite_block(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(to_float(x[i]))) return false;
  }
  return true;
}

template <class T>
void min_max_block(const T* x, int64_t n, float& lo, float& hi) {
  lo = std::numeric_limits<float>::infinity();
  hi = -lo;
  for (int64_t i = 0; i < n; ++i) {
    const float v = to_float(x[i]);
    lo = v < lo ? v : lo;
    hi = v > hi ? v : hi;
  }
}

// Sum of squared errors. The order of additions is part of the definition, so that every level finds
// the same range: value i goes to lane i % 16; lanes are added as a tree every 4096 values, in fp64.
template <class T>
double squared_error(const T* x, int64_t n, Params p, Grid grid) {
  const float inv = inverse<Store>(p.scale);
  double total = 0.0;
  for (int64_t start = 0; start < n; start += 4096) {
    const int64_t end = start + 4096 < n ? start + 4096 : n;
    float lanes[16] = {};
    for (int64_t i = start; i < end; ++i) {
      const float v = to_float(x[i]);
      const float q = clamp(unclamped(v, p, inv, grid.offset), grid.qmin, grid.qmax);
      const float e = decode(q, p, grid.offset) - v;
      lanes[i % 16] += e * e;
    }
    for (int width = 8; width > 0; width /= 2) {
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    }
    total += lanes[0];
  }
  return total;
}

template <class T>
Params choose_block(const T* x, int64_t n, RangeSpec spec, bool mse) {
  float lo;
  float hi;
  min_max_block(x, n, lo, hi);
  if (!mse) return params_from_range<Store>(lo, hi, spec);
  return search_range<Store>(lo, hi, spec, [&](Params p) { return squared_error(x, n, p, spec.grid); });
}

// Calls f(T{}) with the C++ type of `dtype`.
template <class F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::f16:
      return f(f16{});
  }
}

void quantize(const void* x, Layout l, BlockParams params, Grid grid, int8_t* codes) {
  with_type(l.dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    for (int64_t b = 0; b < l.blocks; ++b) {
      quantize_block(in + b * l.block, l.block, at(params, b), grid, codes + b * l.block);
    }
  });
}

void dequantize(const int8_t* codes, bool code_signed, Layout l, BlockParams params, Offset offset, void* y) {
  with_type(l.dtype, [&](auto t) {
    using T = decltype(t);
    auto* out = static_cast<T*>(y);
    for (int64_t i = 0; i < l.blocks * l.block; ++i) {
      const float q = code_signed ? codes[i] : static_cast<uint8_t>(codes[i]);
      out[i] = from_float<T>(decode(q, at(params, i / l.block), offset));
    }
  });
}

void fake_quantize(const void* x, Layout l, BlockParams params, Grid grid, void* y) {
  with_type(l.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const int64_t at0 = b * l.block;
      fake_quantize_block(static_cast<const T*>(x) + at0, l.block, at(params, b), grid, static_cast<T*>(y) + at0);
    }
  });
}

void fake_quantize_backward(const void* grad, const void* x, Layout l, BlockParams params, Grid grid, void* dx) {
  with_type(l.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const int64_t at0 = b * l.block;
      backward_block(static_cast<const T*>(grad) + at0, static_cast<const T*>(x) + at0, l.block, at(params, b), grid,
                     static_cast<T*>(dx) + at0);
    }
  });
}

void quantize_dynamic(const void* x, Layout l, RangeSpec spec, int8_t* codes, float* scale, float* offset) {
  with_type(l.dtype, [&](auto t) {
    for (int64_t b = 0; b < l.blocks; ++b) {
      const auto* in = static_cast<const decltype(t)*>(x) + b * l.block;
      const Params p = choose_block(in, l.block, spec, false);
      scale[b] = all_finite_block(in, l.block) ? p.scale : std::numeric_limits<float>::quiet_NaN();
      offset[b] = p.offset;
      quantize_block(in, l.block, p, spec.grid, codes + b * l.block);
    }
  });
}

void fake_quantize_dynamic(const void* x, Layout l, RangeSpec spec, void* y) {
  with_type(l.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const T* in = static_cast<const T*>(x) + b * l.block;
      fake_quantize_block(in, l.block, choose_block(in, l.block, spec, false), spec.grid,
                          static_cast<T*>(y) + b * l.block);
    }
  });
}

void fake_quantize_dynamic_backward(const void* grad, const void* x, Layout l, RangeSpec spec, void* dx) {
  with_type(l.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const int64_t at0 = b * l.block;
      const T* in = static_cast<const T*>(x) + at0;
      backward_block(static_cast<const T*>(grad) + at0, in, l.block, choose_block(in, l.block, spec, false), spec.grid,
                     static_cast<T*>(dx) + at0);
    }
  });
}

bool all_finite(const void* x, Layout l) {
  bool finite = true;
  with_type(l.dtype,
            [&](auto t) { finite = all_finite_block(static_cast<const decltype(t)*>(x), l.blocks * l.block); });
  return finite;
}

void min_max(const void* x, Layout l, float* lo, float* hi) {
  with_type(l.dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    for (int64_t b = 0; b < l.blocks; ++b) min_max_block(in + b * l.block, l.block, lo[b], hi[b]);
  });
}

void choose_range(const void* x, Layout l, RangeSpec spec, bool mse, float* scale, float* offset) {
  with_type(l.dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const Params p = choose_block(in + b * l.block, l.block, spec, mse);
      const bool poisoned = mse && !all_finite_block(in + b * l.block, l.block);
      scale[b] = poisoned ? std::numeric_limits<float>::quiet_NaN() : p.scale;
      offset[b] = p.offset;
    }
  });
}

}  // namespace

const AffineKernels affine_ref = {
    .quantize = quantize,
    .dequantize = dequantize,
    .fake_quantize = fake_quantize,
    .fake_quantize_backward = fake_quantize_backward,
    .quantize_dynamic = quantize_dynamic,
    .fake_quantize_dynamic = fake_quantize_dynamic,
    .fake_quantize_dynamic_backward = fake_quantize_dynamic_backward,
    .all_finite = all_finite,
    .min_max = min_max,
    .choose_range = choose_range,
};

void params_from_ranges(const float* lo, const float* hi, int64_t blocks, RangeSpec spec, float* scale, float* offset) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Params p = params_from_range<Store>(lo[b], hi[b], spec);
    scale[b] = p.scale;
    offset[b] = p.offset;
  }
}

}  // namespace phiquant
