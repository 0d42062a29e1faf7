// The kernels of affine_ref.cpp over vectors of V::width floats; included once by each vector level.
//
// V gives what range.inl asks of lanes, and: width, loads and stores of float, bf16, f16 and of codes,
// selection in a range, any_nan, horizontal min and max. Everything sits in an anonymous
// namespace, so that no function compiled here can stand in for another level's.

#include <immintrin.h>

#include <cstring>
#include <limits>

#include "core/affine.h"
#include "core/codec.inl"
#include "core/range.inl"

namespace phiquant {
namespace {

// Rounding of one float to 16 bits or a power of two, by F16C and SSE, which every vector level has.
struct Store {
  static float power_of_two(float v) {
    return _mm_cvtss_f32(_mm_and_ps(_mm_set_ss(v), _mm_castsi128_ps(_mm_set1_epi32(0x7f800000))));
  }
  static float round_f16(float v) { return _cvtsh_ss(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT)); }
  static float round_bf16(float v) {
    const __m128i u = _mm_castps_si128(_mm_set_ss(v));
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(u, 16), _mm_set1_epi32(1));
    const __m128i rounded = _mm_add_epi32(u, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_slli_epi32(_mm_srli_epi32(rounded, 16), 16)));
  }
};

template <class V>
struct Affine {
  using F = typename V::F;
  static constexpr int64_t W = V::width;

  // The last, short vector of a block goes through a buffer.
  template <class T>
  static void store_part(T* p, F v, int64_t n) {
    T buffer[W];
    V::store(buffer, v);
    std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
  }

  template <class C, class T>
  static void quantize_block(const T* x, int64_t n, const C& c, int8_t* codes) {
    int64_t i = 0;
    for (; i + W <= n; i += W) c.store(codes + i, V::load(x + i));
    if (i < n) {
      int8_t buffer[W];
      c.store(buffer, load_part<V>(x + i, n - i));
      std::memcpy(codes + i, buffer, static_cast<size_t>(n - i));
    }
  }

  template <class C, class T>
  static void dequantize_block(const int8_t* codes, int64_t n, const C& c, T* y) {
    int64_t i = 0;
    for (; i + W <= n; i += W) V::store(y + i, c.load(codes + i));
    if (i < n) {
      int8_t buffer[W] = {};
      std::memcpy(buffer, codes + i, static_cast<size_t>(n - i));
      store_part(y + i, c.load(buffer), n - i);
    }
  }

  template <class C, class T>
  static void fake_quantize_block(const T* x, int64_t n, const C& c, T* y) {
    int64_t i = 0;
    for (; i + W <= n; i += W) V::store(y + i, c.nearest(V::load(x + i)));
    if (i < n) store_part(y + i, c.nearest(load_part<V>(x + i, n - i)), n - i);
  }

  template <class C, class T>
  static void backward_block(const T* grad, const T* x, int64_t n, const C& c, T* dx) {
    int64_t i = 0;
    for (; i + W <= n; i += W) V::store(dx + i, c.pass(V::load(x + i), V::load(grad + i)));
    if (i < n) store_part(dx + i, c.pass(load_part<V>(x + i, n - i), load_part<V>(grad + i, n - i)), n - i);
  }

  // A value that is not finite makes its product with 0, and so the sum, NaN.
  template <class T>
  static bool all_finite_block(const T* x, int64_t n) {
    const F zero = V::set1(0.0f);
    F sum = zero;
    for (int64_t i = 0; i < n; i += W) {
      sum = V::add(sum, V::mul(i + W <= n ? V::load(x + i) : load_part<V>(x + i, n - i), zero));
    }
    return !V::any_nan(sum);
  }

  template <class T>
  static void min_max_block(const T* x, int64_t n, float& lo, float& hi) {
    F low = V::set1(std::numeric_limits<float>::infinity());
    F high = V::set1(-std::numeric_limits<float>::infinity());
    int64_t i = 0;
    if (n >= 8 * W) {  // a long block: four accumulators hide the latency of min and max
      F lows[4] = {low, low, low, low};
      F highs[4] = {high, high, high, high};
      for (; i + 4 * W <= n; i += 4 * W) {
        for (int64_t k = 0; k < 4; ++k) {
          const F v = V::load(x + i + k * W);
          lows[k] = V::min(v, lows[k]);
          highs[k] = V::max(v, highs[k]);
        }
      }
      low = V::min(V::min(lows[0], lows[1]), V::min(lows[2], lows[3]));
      high = V::max(V::max(highs[0], highs[1]), V::max(highs[2], highs[3]));
    }
    for (; i < n; i += W) {
      const F v = i + W <= n ? V::load(x + i) : load_part<V>(x + i, n - i);
      low = V::min(v, low);
      high = V::max(v, high);
    }
    V::horizontal(low, high, lo, hi);
  }

  // Lanes and order of affine_ref.cpp's abs_sum_block.
  template <class T>
  static void abs_sum_block(const T* x, int64_t n, float above, double& sum, int64_t& count) {
    constexpr int64_t kVectors = 16 / W;
    const F threshold = V::set1(above);
    const F zero = V::set1(0.0f);
    sum = 0.0;
    count = 0;
    for (int64_t piece = 0; piece < n; piece += kSumPiece) {
      double part = 0.0;
      const int64_t last = piece + kSumPiece < n ? piece + kSumPiece : n;
      for (int64_t start = piece; start < last; start += 4096) {
        const int64_t end = start + 4096 < last ? start + 4096 : last;
        F sums[kVectors];
        for (F& s : sums) s = zero;
        for (int64_t i = start, k = 0; i < end; i += W, k = (k + 1) % kVectors) {
          const int64_t valid = end - i < W ? end - i : W;
          const F v = V::abs(valid == W ? V::load(x + i) : V::first_lanes(load_part<V>(x + i, valid), valid));
          const auto counted = V::less(threshold, v);
          sums[k] = V::add(sums[k], V::select(counted, v, zero));
          count += V::count(counted) - (above < 0.0f ? W - valid : 0);  // the lanes that are filled up hold 0
        }
        float lanes[16];
        for (int64_t k = 0; k < kVectors; ++k) V::store(lanes + k * W, sums[k]);
        for (int width = 8; width > 0; width /= 2) {
          for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
        }
        part += lanes[0];
      }
      sum += part;
    }
  }

  // What the rule makes a scale of: see Range::parameters.
  template <class T>
  static void statistics(const T* x, int64_t n, Rule rule, float& lo, float& hi) {
    if (!takes_means(rule)) return min_max_block(x, n, lo, hi);
    double sum;
    int64_t count;
    abs_sum_block(x, n, -1.0f, sum, count);
    lo = 0.0f;
    hi = mean_of(sum, count);
    if (rule == Rule::twn) {
      lo = mean_of(sum, count, kTwnThreshold);
      abs_sum_block(x, n, lo, sum, count);
      hi = mean_of(sum, count);
    }
  }

  // lo, hi of `blocks` blocks; short ones four at a time, where the level can.
  template <class T>
  static void min_max_blocks(const T* x, int64_t n, int64_t blocks, float* lo, float* hi) {
    int64_t b = 0;
    if constexpr (requires { &V::horizontal4; }) {
      for (; (n == W || n == 2 * W) && b + 4 <= blocks; b += 4) {
        F low[4];
        F high[4];
        for (int64_t k = 0; k < 4; ++k) {
          const T* values = x + (b + k) * n;
          low[k] = V::min(V::load(values), V::set1(std::numeric_limits<float>::infinity()));
          high[k] = V::max(V::load(values), V::set1(-std::numeric_limits<float>::infinity()));
          if (n == W) continue;
          low[k] = V::min(V::load(values + W), low[k]);
          high[k] = V::max(V::load(values + W), high[k]);
        }
        V::horizontal4(low, high, lo + b, hi + b);
      }
    }
    for (; b < blocks; ++b) min_max_block(x + b * n, n, lo[b], hi[b]);
  }

  // Finds the ranges of some blocks, then their parameters, a block in each lane, then calls
  // use(block, scale, inverse, offset) for each while its values are still in cache.
  template <class T, class Use>
  static void with_ranges(const T* x, Layout l, const RangeSpec& spec, Use use) {
    const int64_t batch = l.block * W <= 4096 ? W : l.block <= 2048 ? 4096 / l.block : 1;
    for (int64_t first = 0; first < l.blocks; first += batch) {
      const int64_t count = l.blocks - first < batch ? l.blocks - first : batch;
      float lo[W] = {};
      float hi[W] = {};
      if (!takes_means(spec.rule)) {
        min_max_blocks(x + first * l.block, l.block, count, lo, hi);
      } else {
        for (int64_t j = 0; j < count; ++j) {
          statistics(x + (first + j) * l.block, l.block, spec.rule, lo[j], hi[j]);
        }
      }
      const Found<V> found = Range<V>::parameters(V::load(lo), V::load(hi), spec);
      float scale[W];
      float inv[W];
      float offset[W];
      V::store(scale, found.scale);
      V::store(inv, encoding_inverse<V>(spec.rule, V::load(lo), found.scale));
      V::store(offset, found.offset);
      for (int64_t j = 0; j < count; ++j) use(first + j, scale[j], inv[j], offset[j]);
    }
  }

  // Calls f(T{}) with the C++ type of `dtype`.
  template <class Body>
  static void with_type(Dtype dtype, Body f) {
    switch (dtype) {
      case Dtype::f32:
        return f(float{});
      case Dtype::bf16:
        return f(bf16{});
      case Dtype::f16:
        return f(f16{});
    }
  }

  // Calls f.operator()<codec>(T{}) with the C++ type of `dtype` and the codec of `grid`.
  template <class Body>
  static void with(Dtype dtype, const Grid& grid, Body f) {
    with_type(dtype, [&](auto t) { with_codec<V>(grid, [&]<class C>() { f.template operator()<C>(t); }); });
  }

  // Calls f.operator()<offset>(T{}) with the C++ type of `dtype`.
  template <class Body>
  static void with_offset(Dtype dtype, Offset offset, Body f) {
    with_type(dtype, [&](auto t) {
      if (offset == Offset::minimum) return f.template operator()<Offset::minimum>(t);
      return f.template operator()<Offset::zero_point>(t);
    });
  }

  static BlockGrid<V> spread(float scale, float inv, float offset) {
    return {V::set1(scale), V::set1(inv), V::set1(offset)};
  }

  // Calls use(first value, codec) for each block.
  template <class C, class Use>
  static void each_block(Layout l, BlockParams params, const Grid& grid, Use use) {
    auto shared = typename C::Shared(grid, 0);
    for (int64_t b = 0; b < l.blocks; ++b) {
      if (grid.per_block && b > 0) shared = typename C::Shared(grid, b);
      const float inv = params.inverse ? params.inverse[b] : inverse<Store>(params.scale[b]);
      use(b * l.block, C{shared, spread(params.scale[b], inv, params.offset ? params.offset[b] : 0.0f)});
    }
  }

  static void quantize(const void* x, Layout l, BlockParams params, Grid grid, int8_t* codes) {
    with(l.dtype, grid, [&]<class C>(auto t) {
      const auto* in = static_cast<const decltype(t)*>(x);
      each_block<C>(l, params, grid, [&](int64_t at, const C& c) { quantize_block(in + at, l.block, c, codes + at); });
    });
  }

  static void dequantize(const int8_t* codes, Layout l, BlockParams params, Grid grid, void* y) {
    with(l.dtype, grid, [&]<class C>(auto t) {
      auto* out = static_cast<decltype(t)*>(y);
      each_block<C>(l, params, grid,
                    [&](int64_t at, const C& c) { dequantize_block(codes + at, l.block, c, out + at); });
    });
  }

  static void fake_quantize(const void* x, Layout l, BlockParams params, Grid grid, void* y) {
    with(l.dtype, grid, [&]<class C>(auto t) {
      const auto* in = static_cast<const decltype(t)*>(x);
      auto* out = static_cast<decltype(t)*>(y);
      each_block<C>(l, params, grid,
                    [&](int64_t at, const C& c) { fake_quantize_block(in + at, l.block, c, out + at); });
    });
  }

  static void fake_quantize_backward(const void* grad, const void* x, Layout l, BlockParams params, Grid grid,
                                     void* dx) {
    with(l.dtype, grid, [&]<class C>(auto t) {
      using T = decltype(t);
      each_block<C>(l, params, grid, [&](int64_t at, const C& c) {
        backward_block(static_cast<const T*>(grad) + at, static_cast<const T*>(x) + at, l.block, c,
                       static_cast<T*>(dx) + at);
      });
    });
  }

  static void quantize_dynamic(const void* x, Layout l, RangeSpec spec, int8_t* codes, float* scale, float* offset) {
    with(l.dtype, spec.grid, [&]<class C>(auto t) {
      const auto* in = static_cast<const decltype(t)*>(x);
      const auto shared = typename C::Shared(spec.grid, 0);
      with_ranges(in, l, spec, [&](int64_t b, float s, float inv, float o) {
        quantize_block(in + b * l.block, l.block, C{shared, spread(s, inv, o)}, codes + b * l.block);
        scale[b] = all_finite_block(in + b * l.block, l.block) ? s : std::numeric_limits<float>::quiet_NaN();
        offset[b] = o;
      });
    });
  }

  static void fake_quantize_dynamic(const void* x, Layout l, RangeSpec spec, void* y) {
    with(l.dtype, spec.grid, [&]<class C>(auto t) {
      const auto* in = static_cast<const decltype(t)*>(x);
      auto* out = static_cast<decltype(t)*>(y);
      const auto shared = typename C::Shared(spec.grid, 0);
      with_ranges(in, l, spec, [&](int64_t b, float s, float inv, float o) {
        fake_quantize_block(in + b * l.block, l.block, C{shared, spread(s, inv, o)}, out + b * l.block);
      });
    });
  }

  static void fake_quantize_dynamic_backward(const void* grad, const void* x, Layout l, RangeSpec spec, void* dx) {
    with(l.dtype, spec.grid, [&]<class C>(auto t) {
      using T = decltype(t);
      const T* in = static_cast<const T*>(x);
      const auto shared = typename C::Shared(spec.grid, 0);
      with_ranges(in, l, spec, [&](int64_t b, float s, float inv, float o) {
        const int64_t at = b * l.block;
        backward_block(static_cast<const T*>(grad) + at, in + at, l.block, C{shared, spread(s, inv, o)},
                       static_cast<T*>(dx) + at);
      });
    });
  }

  static bool all_finite(const void* x, Layout l) {
    bool finite = true;
    with_type(l.dtype,
              [&](auto t) { finite = all_finite_block(static_cast<const decltype(t)*>(x), l.blocks * l.block); });
    return finite;
  }

  static void min_max(const void* x, Layout l, float* lo, float* hi) {
    with_type(l.dtype, [&](auto t) {
      const auto* in = static_cast<const decltype(t)*>(x);
      min_max_blocks(in, l.block, l.blocks, lo, hi);
    });
  }

  static void abs_sum(const void* x, Layout l, const float* above, double* sum, int64_t* count) {
    with_type(l.dtype, [&](auto t) {
      const auto* in = static_cast<const decltype(t)*>(x);
      for (int64_t b = 0; b < l.blocks; ++b) {
        abs_sum_block(in + b * l.block, l.block, above ? above[b] : -1.0f, sum[b], count[b]);
      }
    });
  }

  static void choose_range(const void* x, Layout l, RangeSpec spec, float* scale, float* offset) {
    with_type(l.dtype, [&](auto t) {
      with_ranges(static_cast<const decltype(t)*>(x), l, spec, [&](int64_t b, float s, float, float o) {
        scale[b] = s;
        offset[b] = o;
      });
    });
  }

  static constexpr AffineKernels table = {
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
};

}  // namespace
}  // namespace phiquant
