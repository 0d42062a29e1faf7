// The reference kernels: the formulas, one value at a time. Also what runs at level `scalar`.
#include <algorithm>
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
  static float power_of_two(float v) { return std::bit_cast<float>(std::bit_cast<uint32_t>(v) & 0x7f800000u); }
};

// qmin where v is NaN, as the vector instructions have it.
inline float clamp(float v, float lo, float hi) { return Range<Lane<Store>>::clamp(v, lo, hi); }

// What one block's codes stand for: its grid, levels and parameters.
struct Codec {
  Grid grid;
  const float* levels;
  Params p;
  float inv;

  // Where the mask looks: integers rounded, others on the scale of their levels; before any clamp.
  float position(float x) const {
    if (grid.format != Format::integer) return x * inv;
    return grid.offset == Offset::minimum ? std::nearbyint((x - p.offset) * inv) : std::nearbyint(x * inv) + p.offset;
  }
  bool inside(float x) const {
    const float t = position(x);
    if (grid.format == Format::integer) return t >= grid.qmin && t <= grid.qmax;
    if (grid.format != Format::table) return std::fabs(t) <= format().reach;
    const int last = grid.size - 1;
    return t >= levels[0] - (levels[1] - levels[0]) * 0.5f &&
           t <= levels[last] + (levels[last] - levels[last - 1]) * 0.5f;
  }

  // Integers: the code. Minifloats: the rounded value. Tables: the index.
  float nearest(float x) const {
    const float t = position(x);
    if (grid.format == Format::integer) return clamp(t, grid.qmin, grid.qmax);
    if (grid.format == Format::table) {
      int q = 0;
      for (int i = 1; i < grid.size; ++i) q += t >= (double{levels[i - 1]} + double{levels[i]}) * 0.5;
      return static_cast<float>(q);
    }
    const float v = clamp(t, -format().largest, format().largest);
    const float step = std::ldexp(1.0f, exponent(v) - format().fraction);
    return std::copysign(std::nearbyint(v / step) * step, v);
  }
  float value(float q) const {
    if (grid.format == Format::integer) {
      return grid.offset == Offset::minimum ? p.scale * q + p.offset : p.scale * (q - p.offset);
    }
    return p.scale * (grid.format == Format::table ? levels[static_cast<int>(q)] : q);
  }
  int8_t code(float x) const {
    const float q = nearest(x);
    if (grid.format == Format::integer || grid.format == Format::table) return static_cast<int8_t>(static_cast<int>(q));
    const Minifloat& f = format();
    const float fraction = std::fabs(q) * std::ldexp(1.0f, f.fraction - exponent(q));  // with its leading 1, if normal
    const int bits = static_cast<int>(fraction) + (exponent(q) - f.emin) * (1 << f.fraction);
    return static_cast<int8_t>(bits | std::signbit(q) << (f.exponent + f.fraction));
  }
  float decode(int8_t code) const {
    const uint8_t bits = static_cast<uint8_t>(code);
    if (grid.format == Format::integer) return value(grid.qmin < 0.0f ? code : bits);
    if (grid.format == Format::table) return value(static_cast<float>(bits < grid.size ? bits : grid.size - 1));
    const Minifloat& f = format();
    const int field = bits >> f.fraction & ((1 << f.exponent) - 1);
    const int fraction = bits & ((1 << f.fraction) - 1);
    const int normal = field > 0;
    float v = std::ldexp(static_cast<float>(fraction + (normal << f.fraction)), f.emin + field - normal - f.fraction);
    if (v > f.largest) {
      v = v < f.special ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
    }
    return value(bits >> (f.exponent + f.fraction) & 1 ? -v : v);
  }

 private:
  const Minifloat& format() const { return kMinifloats[static_cast<int>(grid.format)]; }
  int exponent(float v) const { return v == 0.0f ? format().emin : std::max(std::ilogb(v), format().emin); }
};

Codec codec_at(const Grid& grid, BlockParams params, int64_t b) {
  const float* levels = grid.levels + (grid.per_block ? b * grid.size : 0);
  const Params p{params.scale[b], params.offset ? params.offset[b] : 0.0f};
  return {grid, levels, p, params.inverse ? params.inverse[b] : inverse<Store>(p.scale)};
}

template <class T>
void quantize_block(const T* x, int64_t n, const Codec& c, int8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = c.code(to_float(x[i]));
}

template <class T>
void fake_quantize_block(const T* x, int64_t n, const Codec& c, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = from_float<T>(c.value(c.nearest(to_float(x[i]))));
}

template <class T>
void backward_block(const T* grad, const T* x, int64_t n, const Codec& c, T* dx) {
  for (int64_t i = 0; i < n; ++i) dx[i] = c.inside(to_float(x[i])) ? grad[i] : from_float<T>(0.0f);
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

// Sum and number of the |x| > above. The order of additions is part of the definition: see affine.h.
template <class T>
void abs_sum_block(const T* x, int64_t n, float above, double& sum, int64_t& count) {
  sum = 0.0;
  count = 0;
  for (int64_t piece = 0; piece < n; piece += kSumPiece) {
    double part = 0.0;
    const int64_t last = std::min(n, piece + kSumPiece);
    for (int64_t start = piece; start < last; start += 4096) {
      float lanes[16] = {};
      for (int64_t i = start; i < std::min(last, start + 4096); ++i) {
        const float v = std::fabs(to_float(x[i]));
        if (v > above) {
          lanes[i % 16] += v;
          ++count;
        }
      }
      for (int width = 8; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
      }
      part += lanes[0];
    }
    sum += part;
  }
}

// The parameters of one block, and by what its values are multiplied to encode them.
struct Choice {
  Params p;
  float inv;
};

template <class T>
Choice choose_block(const T* x, int64_t n, RangeSpec spec) {
  float lo = 0.0f;
  float hi;
  if (!takes_means(spec.rule)) {
    min_max_block(x, n, lo, hi);
  } else {
    double sum;
    int64_t count;
    abs_sum_block(x, n, -1.0f, sum, count);
    hi = mean_of(sum, count);
    if (spec.rule == Rule::twn) {
      lo = mean_of(sum, count, kTwnThreshold);
      abs_sum_block(x, n, lo, sum, count);
      hi = mean_of(sum, count);
    }
  }
  const Params p = params_from_range<Store>(lo, hi, spec);
  return {p, encoding_inverse<Lane<Store>>(spec.rule, lo, p.scale)};
}

template <class T>
Codec codec_for(const T* x, int64_t n, const RangeSpec& spec) {
  const Choice choice = choose_block(x, n, spec);
  return {spec.grid, spec.grid.levels, choice.p, choice.inv};
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
      quantize_block(in + b * l.block, l.block, codec_at(grid, params, b), codes + b * l.block);
    }
  });
}

void dequantize(const int8_t* codes, Layout l, BlockParams params, Grid grid, void* y) {
  with_type(l.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t i = 0; i < l.blocks * l.block; ++i) {
      static_cast<T*>(y)[i] = from_float<T>(codec_at(grid, params, i / l.block).decode(codes[i]));
    }
  });
}

void fake_quantize(const void* x, Layout l, BlockParams params, Grid grid, void* y) {
  with_type(l.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const int64_t at = b * l.block;
      fake_quantize_block(static_cast<const T*>(x) + at, l.block, codec_at(grid, params, b), static_cast<T*>(y) + at);
    }
  });
}

void fake_quantize_backward(const void* grad, const void* x, Layout l, BlockParams params, Grid grid, void* dx) {
  with_type(l.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const int64_t at = b * l.block;
      backward_block(static_cast<const T*>(grad) + at, static_cast<const T*>(x) + at, l.block,
                     codec_at(grid, params, b), static_cast<T*>(dx) + at);
    }
  });
}

void quantize_dynamic(const void* x, Layout l, RangeSpec spec, int8_t* codes, float* scale, float* offset) {
  with_type(l.dtype, [&](auto t) {
    for (int64_t b = 0; b < l.blocks; ++b) {
      const auto* in = static_cast<const decltype(t)*>(x) + b * l.block;
      const Codec c = codec_for(in, l.block, spec);
      scale[b] = all_finite_block(in, l.block) ? c.p.scale : std::numeric_limits<float>::quiet_NaN();
      offset[b] = c.p.offset;
      quantize_block(in, l.block, c, codes + b * l.block);
    }
  });
}

void fake_quantize_dynamic(const void* x, Layout l, RangeSpec spec, void* y) {
  with_type(l.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const T* in = static_cast<const T*>(x) + b * l.block;
      fake_quantize_block(in, l.block, codec_for(in, l.block, spec), static_cast<T*>(y) + b * l.block);
    }
  });
}

void fake_quantize_dynamic_backward(const void* grad, const void* x, Layout l, RangeSpec spec, void* dx) {
  with_type(l.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t b = 0; b < l.blocks; ++b) {
      const int64_t at = b * l.block;
      const T* in = static_cast<const T*>(x) + at;
      backward_block(static_cast<const T*>(grad) + at, in, l.block, codec_for(in, l.block, spec),
                     static_cast<T*>(dx) + at);
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

void abs_sum(const void* x, Layout l, const float* above, double* sum, int64_t* count) {
  with_type(l.dtype, [&](auto t) {
    const auto* in = static_cast<const decltype(t)*>(x);
    for (int64_t b = 0; b < l.blocks; ++b) {
      abs_sum_block(in + b * l.block, l.block, above ? above[b] : -1.0f, sum[b], count[b]);
    }
  });
}

void choose_range(const void* x, Layout l, RangeSpec spec, float* scale, float* offset) {
  with_type(l.dtype, [&](auto t) {
    for (int64_t b = 0; b < l.blocks; ++b) {
      const Params p = choose_block(static_cast<const decltype(t)*>(x) + b * l.block, l.block, spec).p;
      scale[b] = p.scale;
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
    .abs_sum = abs_sum,
    .choose_range = choose_range,
};

void params_from_ranges(const float* lo, const float* hi, int64_t blocks, RangeSpec spec, float* scale, float* offset,
                        float* inverse) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Params p = params_from_range<Store>(lo[b], hi[b], spec);
    scale[b] = p.scale;
    offset[b] = p.offset;
    if (inverse) inverse[b] = encoding_inverse<Lane<Store>>(spec.rule, lo[b], p.scale);
  }
}

void means_from_sums(const double* sums, const int64_t* counts, int64_t blocks, int64_t pieces, float factor,
                     float* means) {
  for (int64_t b = 0; b < blocks; ++b) {
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t i = b * pieces; i < (b + 1) * pieces; ++i) {
      sum += sums[i];
      count += counts[i];
    }
    means[b] = mean_of(sum, count, factor);
  }
}

}  // namespace phiquant
