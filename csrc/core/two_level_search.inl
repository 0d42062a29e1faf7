// The kernel of two_level_search.h over lanes V. Sums are those of search.inl for a block that lies across lanes, so
// every level adds in the same order.
#include "core/search.inl"
#include "core/two_level_search.h"

namespace phiquant {
namespace {

template <class V>
struct TwoLevelSearch {
  using F = typename V::F;
  using Lanes = Search<V>;

  static float first(F v) {
    float lanes[V::width];
    V::store(lanes, v);
    return lanes[0];
  }

  // One super-block: its values, and where its parameters are.
  template <class E, class T>
  struct Super {
    using Block = typename Lanes::template Long<E, T, true>;
    const T* x;
    const float* weights;  // of one row of columns, from the super-block's first value on
    const TwoLevelGrid& grid;
    int64_t n;
    float *scales, *minimums, *super_scale, *super_minimum;

    Block block(int64_t b) const { return {x + b * n, weights + b * n, n, grid.block}; }
    Found<V> range(float scale, float minimum) const {
      return {V::set1(*super_scale * scale), V::set1(minimums ? -(*super_minimum * minimum) : 0.0f)};
    }
    float error(int64_t b, float scale, float minimum) const { return first(block(b).error(range(scale, minimum))); }
    float minimum(int64_t b) const { return minimums ? minimums[b] : 0.0f; }

    float error() const {
      double sum = 0.0;
      for (int64_t b = 0; b < grid.subs; ++b) sum += error(b, scales[b], minimum(b));
      return static_cast<float>(sum);
    }
    // The codes of the block's parameters, moved by up to two where that is better.
    void step(int64_t b) {
      const float scale = scales[b], low = minimum(b);
      float least = error(b, scale, low);
      for (int i = -2; i <= 2; ++i) {
        const float s = scale + static_cast<float>(i);
        if (s < grid.qmin || s > grid.qmax) continue;
        for (int j = minimums ? -2 : 0; j <= (minimums ? 2 : 0); ++j) {
          const float m = low + static_cast<float>(j);
          if ((i == 0 && j == 0) || (minimums && (m < grid.qmin || m > grid.qmax))) continue;
          const float found = error(b, s, m);
          if (!(found < least)) continue;
          least = found;
          scales[b] = s;
          if (minimums) minimums[b] = m;
        }
      }
    }
    // Super-block scales by least squares: x is near D a + D' a', a = c q, a' = -c'.
    void fit() {
      double aa = 0.0, ab = 0.0, bb = 0.0, ax = 0.0, bx = 0.0;
      for (int64_t b = 0; b < grid.subs; ++b) {
        const Block values = block(b);
        const Found<V> at = range(scales[b], minimum(b));
        const E errors(at, grid.block.grid);
        const double c = scales[b], low = -minimum(b);
        // y = s q: from it a, whatever the element
        const auto y = [&](F v) {
          if constexpr (E::kMinimum)
            return errors.decoded(V::sub(v, at.offset));
          else
            return errors.decoded(v);
        };
        const double s = static_cast<double>(*super_scale) * c;
        const double to_a = s != 0.0 ? c / s : 0.0;
        aa += to_a * to_a * first(values.sum([&](F v) { return V::mul(y(v), y(v)); }));
        ax += to_a * first(values.sum([&](F v) { return V::mul(y(v), v); }));
        if (!minimums) continue;
        ab += to_a * low * first(values.sum(y));
        bb += low * low * first(values.sum([](F) { return V::set1(1.0f); }));
        bx += low * first(values.sum([](F v) { return v; }));
      }
      const float before = error();
      const float kept = *super_scale, kept_minimum = minimums ? *super_minimum : 0.0f;
      double d = aa > 0.0 ? ax / aa : 0.0, d_minimum = 0.0;
      if (minimums) {
        const double determinant = aa * bb - ab * ab;
        if (!(determinant > 1e-6 * aa * bb)) return;
        d = (ax * bb - bx * ab) / determinant;
        d_minimum = (aa * bx - ab * ax) / determinant;
      }
      *super_scale = first(Range<V>::stored(V::set1(static_cast<float>(d)), grid.storage));
      if (minimums) *super_minimum = first(Range<V>::stored(V::set1(static_cast<float>(d_minimum)), grid.storage));
      if (error() < before) return;
      *super_scale = kept;
      if (minimums) *super_minimum = kept_minimum;
    }
  };

  template <class E, class T>
  static void run(const T* x, Layout l, const TwoLevelGrid& grid, Weights weights, int rounds, TwoLevelParams p) {
    const int64_t length = grid.subs * l.block;
    for (int64_t i = 0; i < l.blocks / grid.subs; ++i) {
      const int64_t b = i * grid.subs;
      Super<E, T> super{x + i * length,
                        Lanes::weights_of(weights, weights.first + i * length),
                        grid,
                        l.block,
                        p.scales + b,
                        p.minimums ? p.minimums + b : nullptr,
                        p.super_scales + i,
                        p.super_minimums ? p.super_minimums + i : nullptr};
      for (int round = 0; round < rounds; ++round) {
        for (int64_t j = 0; j < grid.subs; ++j) super.step(j);
        super.fit();
      }
    }
  }

  static void refine(const void* x, Layout l, const TwoLevelGrid& grid, Weights weights, int rounds,
                     TwoLevelParams params) {
    const auto with_type = [&](auto t) {
      const auto* in = static_cast<const decltype(t)*>(x);
      using Plain = typename Lanes::template Errors<Offset::zero_point>;
      using Minimum = typename Lanes::template Errors<Offset::minimum>;
      const Format format = grid.block.grid.format;
      if (format == Format::table) {
        return run<typename Lanes::template CodecErrors<TableCodec<V, 4>>>(in, l, grid, weights, rounds, params);
      }
      if (format != Format::integer) {
        return run<typename Lanes::template CodecErrors<MinifloatCodec<V>>>(in, l, grid, weights, rounds, params);
      }
      if (params.minimums) return run<Minimum>(in, l, grid, weights, rounds, params);
      return run<Plain>(in, l, grid, weights, rounds, params);
    };
    if (l.dtype == Dtype::f32) return with_type(float{});
    if (l.dtype == Dtype::bf16) return with_type(bf16{});
    return with_type(f16{});
  }

  static constexpr TwoLevelSearchKernels table = {.refine = refine};
};

}  // namespace
}  // namespace phiquant
