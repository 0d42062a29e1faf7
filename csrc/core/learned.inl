// The kernels of learned.h over lanes V, as in range.inl; V gives also width, load, store, first_lanes.

#include <cstring>

#include "core/learned.h"
#include "core/range.inl"

namespace phiquant {
namespace {

template <class V>
struct Learned {
  using F = typename V::F;
  static constexpr int64_t W = V::width;
  static constexpr int64_t kVectors = 16 / W;

  template <class T>
  static F load(const T* p, int64_t n) {  // lanes beyond n hold 0
    if (n >= W) return V::load(p);
    T buffer[W] = {};
    std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
    return V::load(buffer);
  }
  template <class T>
  static void store(T* p, F v, int64_t n) {
    if (n >= W) return V::store(p, v);
    T buffer[W];
    V::store(buffer, v);
    std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
  }

  static double tree(const F* sums) {
    float lanes[16];
    for (int64_t k = 0; k < kVectors; ++k) V::store(lanes + k * W, sums[k]);
    for (int width = 8; width > 0; width /= 2) {
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    }
    return lanes[0];
  }

  template <Offset kOffset, class T>
  static void backward_block(const T* grad, const T* x, int64_t n, Params p, const Grid& grid, T* dx, double& dscale,
                             double& clipped) {
    const F zero = V::set1(0.0f);
    const F offset = V::set1(p.offset);
    const F inverse = Range<V>::inverse(V::set1(p.scale));
    const F shift = kOffset == Offset::minimum ? zero : offset;
    const F low = V::sub(V::set1(grid.qmin), shift);
    const F high = V::sub(V::set1(grid.qmax), shift);
    dscale = 0.0;
    clipped = 0.0;
    for (int64_t start = 0; start < n; start += 4096) {
      const int64_t end = start + 4096 < n ? start + 4096 : n;
      F scales[kVectors], clips[kVectors];
      for (int64_t k = 0; k < kVectors; ++k) scales[k] = clips[k] = zero;
      const auto step = [&](int64_t i, int64_t k, int64_t valid) {
        const F value = load(x + i, valid);
        const F g = load(grad + i, valid);
        const F v = V::mul(kOffset == Offset::minimum ? V::sub(value, offset) : value, inverse);
        const F r = V::round(v);
        const F c = V::min(V::max(r, low), high);
        const auto above_low = V::less_equal(low, r);  // neither holds for NaN
        const auto below_high = V::less_equal(r, high);
        const F inside = V::select(above_low, V::select(below_high, g, zero), zero);
        const F outside = V::select(above_low, V::select(below_high, zero, g), g);
        const F moved = V::select(above_low, V::select(below_high, V::sub(c, v), c), c);
        store(dx + i, inside, valid);
        const F product = V::mul(g, moved);
        scales[k] = V::add(scales[k], valid >= W ? product : V::first_lanes(product, valid));
        clips[k] = V::add(clips[k], outside);
      };
      int64_t i = start;
      for (; i + 16 <= end; i += 16) {
        for (int64_t k = 0; k < kVectors; ++k) step(i + k * W, k, W);
      }
      for (int64_t k = 0; i < end; i += W, ++k) step(i, k, end - i);
      dscale += tree(scales);
      clipped += tree(clips);
    }
  }

  template <Offset kOffset, class T>
  static void backward_blocks(const T* grad, const T* x, Layout l, BlockParams params, const Grid& grid, T* dx,
                              double* dscale, double* clipped) {
    for (int64_t b = 0; b < l.blocks; ++b) {
      const Params p{params.scale[b], params.offset ? params.offset[b] : 0.0f};
      const int64_t at = b * l.block;
      backward_block<kOffset>(grad + at, x + at, l.block, p, grid, dx + at, dscale[b], clipped[b]);
    }
  }

  static void backward(const void* grad, const void* x, Layout l, BlockParams params, Grid grid, void* dx,
                       double* dscale, double* clipped) {
    const auto with_type = [&](auto t) {
      using T = decltype(t);
      const auto run = grid.offset == Offset::minimum ? &backward_blocks<Offset::minimum, T>
                                                      : &backward_blocks<Offset::zero_point, T>;
      run(static_cast<const T*>(grad), static_cast<const T*>(x), l, params, grid, static_cast<T*>(dx), dscale, clipped);
    };
    if (l.dtype == Dtype::f32) return with_type(float{});
    if (l.dtype == Dtype::bf16) return with_type(bf16{});
    return with_type(f16{});
  }

  static constexpr LearnedKernels table = {.backward = backward};
};

}  // namespace
}  // namespace phiquant
