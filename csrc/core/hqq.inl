// The kernel of hqq.h over lanes V. Blocks lie in lanes, or a long one across lanes, as in search.inl, and sums are
// taken in its order. A lane whose block has stopped keeps its parameter, so that no block depends on its neighbours.
#include "core/hqq.h"
#include "core/power.inl"
#include "core/search.inl"

namespace phiquant {
namespace {

template <class V>
struct Hqq {
  using F = typename V::F;
  using Lanes = Search<V>;
  static constexpr int64_t W = V::width;
  static constexpr float kStill = 1e-4f;  // of a step, or of the scale

  // What one iteration finds in a block.
  struct Sums {
    F error;   // |d|^p, d in steps
    F first;   // offset: d - e; scale: (x - e) y
    F second;  // scale: y y
  };

  struct Short {
    const F* rows;
    int64_t n;
    template <class Term>
    Sums sum(Term term) const {
      const F zero = V::set1(0.0f);
      Sums total{zero, zero, zero};
      for (int64_t i = 0; i < n; ++i) {
        const Sums s = term(rows[i]);
        total = {V::add(total.error, s.error), V::add(total.first, s.first), V::add(total.second, s.second)};
      }
      return total;
    }
    F poison() const {
      F sum = V::set1(0.0f);
      for (int64_t i = 0; i < n; ++i) sum = V::add(sum, V::mul(rows[i], V::set1(0.0f)));
      return sum;
    }
  };

  template <class T>
  struct Long {
    typename Lanes::template Long<typename Lanes::template Errors<Offset::zero_point>, T, false> values;
    int64_t n;
    template <class Term>
    Sums sum(Term term) const {
      double total[3] = {};
      for (int64_t start = 0; start < n; start += 4096) {
        F sums[3][16 / W];
        for (auto& part : sums) {
          for (F& s : part) s = V::set1(0.0f);
        }
        values.each(start, start + 4096 < n ? start + 4096 : n, [&](F x, int64_t, int64_t k, int64_t valid) {
          const Sums s = term(x);
          const F found[3] = {s.error, s.first, s.second};
          for (int i = 0; i < 3; ++i) {
            sums[i][k] = V::add(sums[i][k], valid == W ? found[i] : V::first_lanes(found[i], valid));
          }
        });
        for (int i = 0; i < 3; ++i) {
          float lanes[16];
          for (int64_t k = 0; k < 16 / W; ++k) V::store(lanes + k * W, sums[i][k]);
          for (int width = 8; width > 0; width /= 2) {
            for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
          }
          total[i] += lanes[0];
        }
      }
      return {V::set1(static_cast<float>(total[0])), V::set1(static_cast<float>(total[1])),
              V::set1(static_cast<float>(total[2]))};
    }
    F poison() const {
      F lo, hi, sum;
      values.scan(lo, hi, sum);
      return sum;
    }
  };

  struct Problem {
    RangeSpec spec;
    HqqSettings settings;
    F unit;  // of errors: the block's first scale
    F inverse_unit;
  };

  struct Best {
    Found<V> range;
    F error;
    void take(F other, const Found<V>& found) {
      const auto better = V::less(other, error);
      error = V::select(better, other, error);
      range.scale = V::select(better, found.scale, range.scale);
      range.offset = V::select(better, found.offset, range.offset);
    }
  };

  // Sums of a block on the grid of `range`; Codec says how it is read.
  template <class Codec, bool kScale, class Block>
  static Sums evaluate(const Block& block, const Problem& p, const Found<V>& range, float beta) {
    const typename Codec::Shared shared(p.spec.grid, 0);
    const Codec codec{shared, {range.scale, Range<V>::inverse(range.scale), range.offset}};
    const F exponent = V::set1(p.settings.power - 1.0f);
    const F weight = V::set1(1.0f / beta);
    const F zero = V::set1(0.0f);
    return block.sum([&](F x) {
      const F y = codec.nearest(x);
      const F d = V::sub(x, y);
      const F size = V::mul(V::abs(d), p.inverse_unit);
      const F power = Power<V>::raise(size, exponent);
      const F left = V::mul(V::max(V::sub(size, V::mul(power, weight)), zero), p.unit);
      const F e = V::copy_sign(left, d);
      if constexpr (kScale) return Sums{V::mul(size, power), V::mul(V::sub(x, e), y), V::mul(y, y)};
      return Sums{V::mul(size, power), V::sub(d, e), zero};
    });
  }

  // Scale or offset of each block, from best.range on; `storage` is that of the parameter.
  template <class Codec, bool kScale, class Block>
  static void iterate(const Block& block, const Problem& p, Storage storage, Best& best) {
    const F zero = V::set1(0.0f);
    const F count = V::set1(static_cast<float>(block.n));
    Found<V> range = best.range;
    F moving = V::set1(1.0f);
    float beta = p.settings.beta;
    for (int i = 0; i < p.settings.iterations; ++i, beta *= p.settings.kappa) {
      const Sums s = evaluate<Codec, kScale>(block, p, range, beta);
      best.take(i ? s.error : Lanes::lowered(s.error, block.n), range);
      F& parameter = kScale ? range.scale : range.offset;
      F next = kScale ? V::mul(parameter, V::div(s.first, s.second)) : V::add(parameter, V::div(s.first, count));
      next = Range<V>::stored(next, storage);
      const F step = V::mul(V::abs(kScale ? parameter : p.unit), V::set1(kStill));
      const auto moved = V::less(step, V::abs(V::sub(next, parameter)));  // no NaN has
      moving = V::select(moved, moving, zero);
      if (!V::any(V::less(zero, moving))) return;
      parameter = V::select(V::less(zero, moving), next, parameter);
    }
  }

  template <class Block>
  static Found<V> solve_integers(const Block& block, const Problem& p, Found<V> start) {
    using Minimum = IntegerCodec<V, Offset::minimum>;
    using ZeroPoint = IntegerCodec<V, Offset::zero_point>;
    const F most = V::set1(std::numeric_limits<float>::infinity());
    Best best{start, most};
    if (p.spec.rule == Rule::minimum) {
      iterate<Minimum, false>(block, p, p.spec.storage, best);
      return best.range;
    }
    if (p.spec.rule == Rule::zero_point) {
      Best free{{start.scale, V::mul(V::sub(V::set1(0.0f), start.scale), start.offset)}, most};
      iterate<Minimum, false>(block, p, Storage::f32, free);
      const F shift = V::mul(V::sub(V::set1(0.0f), free.range.offset), Range<V>::inverse(start.scale));
      const F z = Range<V>::clamp(V::round(shift), p.spec.grid.qmin, p.spec.grid.qmax);
      const Found<V> rounded{start.scale, z};
      best.take(Lanes::lowered(evaluate<ZeroPoint, true>(block, p, start, 1.0f).error, block.n), start);
      best.take(evaluate<ZeroPoint, true>(block, p, rounded, 1.0f).error, rounded);
    }
    iterate<ZeroPoint, true>(block, p, p.spec.storage, best);
    return best.range;
  }

  template <class Block>
  static Found<V> solve_block(const Block& block, RangeSpec spec, HqqSettings settings, Found<V> start) {
    const F unit = V::abs(start.scale);
    const Problem p{spec, settings, unit, Range<V>::inverse(unit)};
    Found<V> found;
    if (spec.grid.format == Format::integer) {
      found = solve_integers(block, p, start);
    } else {
      Best best{start, V::set1(std::numeric_limits<float>::infinity())};
      if (spec.grid.format == Format::table) {
        iterate<TableCodec<V, 4>, true>(block, p, spec.storage, best);
      } else {
        iterate<MinifloatCodec<V>, true>(block, p, spec.storage, best);
      }
      found = best.range;
    }
    const F nan = V::set1(std::numeric_limits<float>::quiet_NaN());
    return {V::select(V::less_equal(block.poison(), V::set1(0.0f)), found.scale, nan), found.offset};
  }

  template <class T>
  static void solve_blocks(const T* x, Layout l, RangeSpec spec, HqqSettings settings, float* scale, float* offset) {
    const int64_t n = l.block;
    F rows[kLaneBlock];
    for (int64_t b = 0; b<l.blocks; b += n> kLaneBlock ? 1 : W) {
      const int64_t count = n > kLaneBlock ? 1 : l.blocks - b < W ? l.blocks - b : W;
      float s[W], o[W];
      for (int64_t j = 0; j < W; ++j) {
        s[j] = scale[b + (j < count ? j : count - 1)];
        o[j] = offset[b + (j < count ? j : count - 1)];
      }
      const Found<V> start{V::load(s), V::load(o)};
      Found<V> found;
      if (n > kLaneBlock) {
        found = solve_block(Long<T>{{x + b * n, nullptr, n, spec}, n}, spec, settings, start);
      } else {
        Lanes::spread([&](int64_t j) { return x + (b + j) * n; }, n, count, rows);
        found = solve_block(Short{rows, n}, spec, settings, start);
      }
      V::store(s, found.scale);
      V::store(o, found.offset);
      for (int64_t j = 0; j < count; ++j) {
        scale[b + j] = s[j];
        offset[b + j] = o[j];
      }
    }
  }

  static void solve(const void* x, Layout l, RangeSpec spec, HqqSettings settings, float* scale, float* offset) {
    const auto run = [&](auto t) {
      solve_blocks(static_cast<const decltype(t)*>(x), l, spec, settings, scale, offset);
    };
    if (l.block == 0) return;
    if (l.dtype == Dtype::f32) return run(float{});
    if (l.dtype == Dtype::bf16) return run(bf16{});
    return run(f16{});
  }

  static constexpr HqqKernels table = {.solve = solve};
};

}  // namespace
}  // namespace phiquant
