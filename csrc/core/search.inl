// The kernels of search.h over lanes V, as in range.inl; a lane holds a block, or a part of a long one.
//
// V gives, beyond what range.inl asks: width, load of each storage type, store of floats, first_lanes, any, bits,
// bit_and, bit_or, and transpose of width vectors.

#include <cmath>
#include <initializer_list>
#include <limits>
#include <utility>
#include <vector>

#include "core/codec.inl"
#include "core/range.inl"
#include "core/search.h"
#include "core/sweep.inl"

namespace phiquant {
namespace {

// Up to this length a block lies in a lane, its values one after the other; a longer one lies across lanes.
constexpr int64_t kLaneBlock = 256;

template <class V>
struct Search {
  using F = typename V::F;
  using Mask = typename V::Mask;
  static constexpr int64_t W = V::width;

  // The best range so far, and its squared error.
  struct Best {
    Found<V> range;
    F error;
    F ratio;
    F side;
  };

  struct Value {
    float v;
  };

  // The squared error of one value on the grid of `range`: of integers, ...
  template <Offset kOffset>
  struct Errors {
    static constexpr bool kInteger = true;
    static constexpr bool kMinimum = kOffset == Offset::minimum;
    F scale, inv, offset, low, high;
    Errors(const Found<V>& range, const Grid& grid)
        : scale(range.scale), inv(Range<V>::inverse(range.scale)), offset(range.offset) {
      const F shift = kOffset == Offset::minimum ? V::set1(0.0f) : offset;
      low = V::sub(V::set1(grid.qmin), shift);
      high = V::sub(V::set1(grid.qmax), shift);
    }
    F code(F x) const { return V::min(V::max(V::round(V::mul(x, inv)), low), high); }
    F decoded(F x) const { return V::mul(scale, code(x)); }  // without a minimum
    F squared(F x) const {
      F e;
      if constexpr (kOffset == Offset::minimum) {
        e = V::sub(V::add(V::mul(scale, code(V::sub(x, offset))), offset), x);
      } else {
        e = V::sub(V::mul(scale, code(x)), x);
      }
      return V::mul(e, e);
    }
  };

  // ... and of other elements.
  template <class Codec>
  struct CodecErrors {
    static constexpr bool kInteger = false;
    static constexpr bool kMinimum = false;
    typename Codec::Shared shared;
    Codec codec;
    CodecErrors(const Found<V>& range, const Grid& grid)
        : shared(grid, 0), codec{shared, {range.scale, Range<V>::inverse(range.scale), range.offset}} {}
    CodecErrors(const CodecErrors&) = delete;
    CodecErrors& operator=(const CodecErrors&) = delete;
    F decoded(F x) const { return codec.nearest(x); }
    F squared(F x) const {
      const F e = V::sub(codec.nearest(x), x);
      return V::mul(e, e);
    }
  };

  // Blocks in lanes: rows[i] holds value i of each block, weights[i] its weight. Values are added in their order.
  template <class E, bool kHasWeights>
  struct Short {
    using Error = E;
    static constexpr bool kInLanes = true;
    static constexpr bool kWeighted = kHasWeights;
    const F* rows;
    const F* weights;
    int64_t n;
    int64_t blocks;
    RangeSpec spec;

    F weighed(F term, int64_t i) const {
      if constexpr (kWeighted) return V::mul(weights[i], term);
      return term;
    }
    // The sum of term(x) over the block, weighed.
    template <class Term>
    F sum(Term term) const {
      F total = V::set1(0.0f);
      for (int64_t i = 0; i < n; ++i) total = V::add(total, weighed(term(rows[i]), i));
      return total;
    }
    F error(const Found<V>& range) const {
      const E errors(range, spec.grid);
      return sum([&](F x) { return errors.squared(x); });
    }
    // Of several ranges at once: one load of a value serves them, and no range waits for the one before.
    template <int kCount>
    void errors(const Found<V>* ranges, F* sums) const {
      errors(ranges, sums, std::make_index_sequence<kCount>());
    }
    template <size_t... kIndex>
    void errors(const Found<V>* ranges, F* sums, std::index_sequence<kIndex...>) const {
      const E e[] = {E(ranges[kIndex], spec.grid)...};
      F s[sizeof...(kIndex)] = {((void)kIndex, V::set1(0.0f))...};
      for (int64_t i = 0; i < n; ++i) {
        const F x = rows[i];
        ((s[kIndex] = V::add(s[kIndex], weighed(e[kIndex].squared(x), i))), ...);
      }
      ((sums[kIndex] = s[kIndex]), ...);
    }
    void scan(F& lo, F& hi, F& poison) const {
      lo = V::set1(std::numeric_limits<float>::infinity());
      hi = V::set1(-std::numeric_limits<float>::infinity());
      poison = V::set1(0.0f);
      for (int64_t i = 0; i < n; ++i) {
        lo = V::min(rows[i], lo);
        hi = V::max(rows[i], hi);
        poison = V::add(poison, V::mul(rows[i], V::set1(0.0f)));
      }
    }
    // The swept scale of each block, for x times `sign`; 0 where the sweep would be too long.
    F sweep(F low, F high, F error, float sign) const {
      float values[kLaneBlock * W], lows[W], highs[W], errors[W], scales[W] = {};
      for (int64_t i = 0; i < n; ++i) V::store(values + i * W, rows[i]);
      V::store(lows, low);
      V::store(highs, high);
      V::store(errors, error);
      SweepMemory memory;
      for (int64_t j = 0; j < blocks; ++j) {
        const auto value = [&](int64_t i) { return sign * values[i * W + j]; };
        scales[j] = static_cast<float>(sweep_block(n, value, lows[j], highs[j], errors[j], memory));
      }
      return V::load(scales);
    }
  };

  // A block across lanes: value i goes to lane i % 16; lanes are added as a tree every 4096 values, in fp64.
  // All lanes of what it returns are alike.
  template <class E, class T, bool kHasWeights>
  struct Long {
    using Error = E;
    static constexpr bool kInLanes = false;
    static constexpr bool kWeighted = kHasWeights;
    const T* x;
    const float* weights;
    int64_t n;
    RangeSpec spec;

    // use(values, where they begin, which vector of the 16, valid lanes)
    template <class Use>
    void each(int64_t start, int64_t end, Use use) const {
      int64_t i = start;
      for (; i + 16 <= end; i += 16) {
        for (int64_t k = 0; k < 16 / W; ++k) use(V::load(x + i + k * W), i + k * W, k, W);
      }
      for (int64_t k = 0; i < end; i += W, ++k) {
        const int64_t valid = end - i < W ? end - i : W;
        use(valid == W ? V::load(x + i) : load_part<V>(x + i, valid), i, k, valid);
      }
    }
    template <int kCount>
    void errors(const Found<V>* ranges, F* sums) const {
      for (int i = 0; i < kCount; ++i) sums[i] = error(ranges[i]);
    }
    template <class Term>
    F sum(Term term) const {
      double total = 0.0;
      for (int64_t start = 0; start < n; start += 4096) {
        F sums[16 / W];
        for (F& sum : sums) sum = V::set1(0.0f);
        each(start, start + 4096 < n ? start + 4096 : n, [&](F v, int64_t at, int64_t k, int64_t valid) {
          F value = term(v);
          if constexpr (kWeighted) {
            value = V::mul(value, valid == W ? V::load(weights + at) : load_part<V>(weights + at, valid));
          }
          sums[k] = V::add(sums[k], valid == W ? value : V::first_lanes(value, valid));
        });
        float lanes[16];
        for (int64_t k = 0; k < 16 / W; ++k) V::store(lanes + k * W, sums[k]);
        for (int width = 8; width > 0; width /= 2) {
          for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
        }
        total += lanes[0];
      }
      return V::set1(static_cast<float>(total));
    }
    F error(const Found<V>& range) const {
      const E errors(range, spec.grid);
      return sum([&](F v) { return errors.squared(v); });
    }
    void scan(F& lo, F& hi, F& poison) const {
      lo = V::set1(std::numeric_limits<float>::infinity());
      hi = V::set1(-std::numeric_limits<float>::infinity());
      poison = V::set1(0.0f);
      each(0, n, [&](F v, int64_t, int64_t, int64_t) {
        lo = V::min(v, lo);
        hi = V::max(v, hi);
        poison = V::add(poison, V::mul(v, V::set1(0.0f)));
      });
      float a[W], b[W], c[W];
      V::store(a, lo);
      V::store(b, hi);
      V::store(c, poison);
      for (int64_t j = 1; j < W; ++j) {
        a[0] = a[j] < a[0] ? a[j] : a[0];
        b[0] = b[j] > b[0] ? b[j] : b[0];
        c[0] += c[j];
      }
      lo = V::set1(a[0]);
      hi = V::set1(b[0]);
      poison = V::set1(c[0]);
    }
    F sweep(F low, F high, F error, float sign) const {
      if (n > kMostBreaks) return V::set1(0.0f);
      float lows[W], highs[W], errors[W];
      V::store(lows, low);
      V::store(highs, high);
      V::store(errors, error);
      std::vector<Value> values(static_cast<size_t>((n + 15) / 16 * 16));
      int64_t at = 0;
      each(0, n, [&](F v, int64_t, int64_t, int64_t) {
        V::store(&values[static_cast<size_t>(at)].v, v);
        at += W;
      });
      SweepMemory memory;
      const auto value = [&](int64_t i) { return sign * values[static_cast<size_t>(i)].v; };
      return V::set1(static_cast<float>(sweep_block(n, value, lows[0], highs[0], errors[0], memory)));
    }
  };

  // Scale and minimum by least squares, for the codes on `range`.
  template <class Block>
  static Found<V> refit(const Block& block, const Found<V>& range) {
    using E = typename Block::Error;
    const E errors(range, block.spec.grid);
    const Storage type = block.spec.storage;
    if constexpr (!E::kMinimum) {  // s' / s, for the values y = s q
      const F yx = block.sum([&](F x) { return V::mul(errors.decoded(x), x); });
      const F yy = block.sum([&](F x) { return V::mul(errors.decoded(x), errors.decoded(x)); });
      return {Range<V>::stored(V::mul(range.scale, V::div(yx, yy)), type), range.offset};
    } else {
      const auto shifted = [&](F x) { return V::sub(x, range.offset); };
      const auto code = [&](F x) { return errors.code(shifted(x)); };
      const F count = block.sum([&](F) { return V::set1(1.0f); });
      const F q1 = block.sum([&](F x) { return code(x); });
      const F q2 = block.sum([&](F x) { return V::mul(code(x), code(x)); });
      const F x1 = block.sum([&](F x) { return shifted(x); });
      const F qx = block.sum([&](F x) { return V::mul(code(x), shifted(x)); });
      const F scale = V::div(V::sub(V::mul(count, qx), V::mul(q1, x1)), V::sub(V::mul(count, q2), V::mul(q1, q1)));
      const F shift = V::div(V::sub(x1, V::mul(scale, q1)), count);
      return {Range<V>::stored(scale, type), Range<V>::stored(V::add(range.offset, shift), type)};
    }
  }

  // Ranges to try, some at a time, in the order in which they come. A range that makes more of the smallest and the
  // largest value alone than the best range so far of all values, in every lane, is passed over: a sum of squares is
  // not less than one of them.
  template <class Block>
  class Trials {
   public:
    Trials(const Block& block, F lo, F hi, Best& best) : block_(block), lo_(lo), hi_(hi), best_(best) {}
    ~Trials() { run(); }
    Trials(const Trials&) = delete;
    Trials& operator=(const Trials&) = delete;

    void add(const Found<V>& range, F ratio, F side) {
      if constexpr (!Block::kWeighted) {
        const typename Block::Error errors(range, block_.spec.grid);
        const F ends = V::max(errors.squared(lo_), errors.squared(hi_));
        if (!V::any(V::less(ends, best_.error))) return;
      }
      ranges_[count_] = range;
      ratios_[count_] = ratio;
      sides_[count_] = side;
      if (++count_ == kMost) run();
    }

   private:
    static constexpr int kMost = 3;
    void run() {
      F errors[kMost];
      if (count_ == 3) block_.template errors<3>(ranges_, errors);
      if (count_ == 2) block_.template errors<2>(ranges_, errors);
      if (count_ == 1) block_.template errors<1>(ranges_, errors);
      for (int i = 0; i < count_; ++i) take_if_less(errors[i], ranges_[i], ratios_[i], sides_[i], best_);
      count_ = 0;
    }

    const Block& block_;
    F lo_, hi_;
    Best& best_;
    int count_ = 0;
    Found<V> ranges_[kMost];
    F ratios_[kMost], sides_[kMost];
  };

  template <class Block>
  static void take_if_better(const Block& block, const Found<V>& range, F ratio, F side, Best& best) {
    take_if_less(block.error(range), range, ratio, side, best);
  }

  static void take_if_less(F error, const Found<V>& range, F ratio, F side, Best& best) {
    const Mask better = V::less(error, best.error);
    best.error = V::select(better, error, best.error);
    best.range.scale = V::select(better, range.scale, best.range.scale);
    best.range.offset = V::select(better, range.offset, best.range.offset);
    best.ratio = V::select(better, ratio, best.ratio);
    best.side = V::select(better, side, best.side);
  }

  // Another range must beat this one by more than the error of the sums.
  static F lowered(F error, int64_t n) {
    const float terms = static_cast<float>(n < kLaneBlock ? n : kLaneBlock);
    return V::mul(error, V::set1(1.0f - (terms + 16.0f) * 0x1p-23f));
  }

  // The range shrunk by `ratio`: about its middle for a minimum, else about zero. For signed_absmax the scale is
  // anchored on the low end (side < 0) or the high end.
  static Found<V> shrunk(F lo, F hi, F ratio, F side, const RangeSpec& spec) {
    const F zero = V::set1(0.0f);
    F a = V::mul(lo, ratio);
    F b = V::mul(hi, ratio);
    if (spec.rule == Rule::minimum) {
      const F half = V::set1(0.5f);
      const F middle = V::add(V::mul(half, lo), V::mul(half, hi));
      a = V::add(middle, V::mul(V::sub(lo, middle), ratio));
      b = V::add(middle, V::mul(V::sub(hi, middle), ratio));
    } else if (spec.rule == Rule::signed_absmax) {
      const F extreme = V::mul(V::max(V::sub(zero, lo), hi), ratio);
      const Mask low = V::less(side, zero);
      a = V::select(low, V::sub(zero, extreme), zero);
      b = V::select(low, zero, extreme);
    }
    return Range<V>::parameters(a, b, spec);
  }

  template <class Block>
  static void finer(const Block& block, F lo, F hi, int steps, float step, Best& best) {
    const F center = best.ratio;
    const F side = best.side;
    Trials<Block> trials(block, lo, hi, best);
    for (int i = -steps; i <= steps; ++i) {
      if (i == 0) continue;
      const F ratio = V::add(center, V::set1(step * static_cast<float>(i)));
      trials.add(shrunk(lo, hi, ratio, side, block.spec), ratio, side);
    }
  }

  template <class Block>
  static Best grid(const Block& block, F lo, F hi) {
    const RangeSpec& spec = block.spec;
    const F one = V::set1(1.0f);
    const Mask high = V::less(V::sub(V::set1(0.0f), lo), hi);
    const F side = V::select(high, one, V::set1(-1.0f));  // that of the value of largest magnitude
    Best best{Range<V>::parameters(lo, hi, spec), one, one, side};
    best.error = lowered(block.error(best.range), block.n);
    const F other = V::sub(V::set1(0.0f), side);
    {
      Trials<Block> trials(block, lo, hi, best);
      for (int i = 0; i < 16; ++i) {
        const F ratio = V::set1(1.0f - 0.04f * static_cast<float>(i));
        if (spec.rule == Rule::signed_absmax) trials.add(shrunk(lo, hi, ratio, other, spec), ratio, other);
        if (i > 0) trials.add(shrunk(lo, hi, ratio, side, spec), ratio, side);
      }
    }
    const F two = V::set1(2.0f);  // the power of two above clips nothing
    if (spec.storage == Storage::e8m0) take_if_better(block, shrunk(lo, hi, two, side, spec), two, side, best);
    finer(block, lo, hi, 2, 0.01f, best);
    return best;
  }

  // The swept scale as stored, and its neighbours of that type.
  template <class Block>
  static void take_swept(const Block& block, F scale, F offset, Best& best) {
    const Storage type = block.spec.storage;
    constexpr float kSteps[] = {0.0f, 0x1p-7f, 0x1p-10f, 0.0f, 0x1p-3f};  // from 1 to its neighbour
    const float step = 0.75f * kSteps[static_cast<int>(type)];            // rounds to one unit in the last place
    const bool powers = type == Storage::e8m0;
    const F middle = Range<V>::stored(scale, type);
    for (const float factor : {1.0f, powers ? 0.5f : 1.0f - step, powers ? 2.0f : 1.0f + step}) {
      const F near = Range<V>::stored(V::mul(middle, V::set1(factor)), type);
      take_if_better(block, {near, offset}, best.ratio, best.side, best);
      if (type == Storage::f32) return;
    }
  }

  // A short block with few codes, in lanes; sweeps for all signs and zero points that the rule allows.
  template <class Block>
  static void sweep_lanes(const Block& block, int64_t codes, Best& best) {
    const RangeSpec& spec = block.spec;
    const LaneSweep<V> sweep(block.rows, block.n, codes);
    const bool shifted = spec.rule == Rule::zero_point;
    const float first = shifted ? spec.grid.qmin : 0.0f;
    const float last = shifted ? spec.grid.qmax : 0.0f;
    for (float zero_point = first; zero_point <= last; zero_point += 1.0f) {
      const F z = V::set1(zero_point);
      const F low = V::sub(V::set1(spec.grid.qmin), z);
      const F high = V::sub(V::set1(spec.grid.qmax), z);
      take_swept(block, sweep.fit(low, high, 1.0f), z, best);
      if (spec.rule == Rule::signed_absmax) {
        take_swept(block, V::sub(z, sweep.fit(low, high, -1.0f)), z, best);
      }
    }
  }

  // The largest magnitude of a code.
  static float reach(const Grid& grid) { return -grid.qmin > grid.qmax ? -grid.qmin : grid.qmax; }

  template <class Block>
  static void refine(const Block& block, F lo, F hi, Best& best) {
    const RangeSpec& spec = block.spec;
    const Grid& grid = spec.grid;
    best.error = lowered(best.error, block.n);
    if constexpr (Block::kInLanes) {
      if (spec.rule == Rule::minimum) {
        for (int i = 0; i < 3; ++i) take_if_better(block, refit(block, best.range), best.ratio, best.side, best);
        return;
      }
      const float codes = spec.rule == Rule::zero_point ? grid.qmax - grid.qmin : reach(grid);
      if (LaneSweep<V>::fits(block.n, codes)) return sweep_lanes(block, static_cast<int64_t>(codes), best);
    }
    float swept[W] = {};
    if (spec.rule != Rule::minimum) {
      const F z = best.range.offset;
      const F low = V::sub(V::set1(grid.qmin), z);
      const F high = V::sub(V::set1(grid.qmax), z);
      const F scale = block.sweep(low, high, best.error, 1.0f);
      V::store(swept, scale);
      take_swept(block, scale, z, best);
      if (spec.rule == Rule::signed_absmax) {
        take_swept(block, V::sub(V::set1(0.0f), block.sweep(low, high, best.error, -1.0f)), z, best);
      }
    }
    if (!Block::kInLanes && swept[0] == 0.0f) {
      finer(block, lo, hi, 9, 0.001f, best);
      finer(block, lo, hi, 9, 0.0001f, best);
    }
  }

  // The range of one block, or of a vector of blocks.
  template <class Block>
  static Found<V> solve(const Block& block, bool exact) {
    F lo, hi, poison;
    block.scan(lo, hi, poison);
    Best best = grid(block, lo, hi);
    if constexpr (Block::kWeighted) {
      for (int i = 0; i < 3; ++i) take_if_better(block, refit(block, best.range), best.ratio, best.side, best);
    } else if constexpr (Block::Error::kInteger) {
      if (exact) refine(block, lo, hi, best);
    }
    const F nan = V::set1(std::numeric_limits<float>::quiet_NaN());
    return {V::select(V::less_equal(poison, V::set1(0.0f)), best.range.scale, nan), best.range.offset};
  }

  // Value i of `count` blocks of n values, into rows[i]; block j begins at begin(j). Lanes beyond repeat the last
  // block.
  template <class Begin>
  static void spread(Begin begin, int64_t n, int64_t count, F* rows) {
    for (int64_t i = 0; i < n; i += W) {
      F v[W];
      for (int64_t j = 0; j < W; ++j) {
        const auto* p = begin(j < count ? j : count - 1) + i;
        v[j] = i + W <= n ? V::load(p) : load_part<V>(p, n - i);
      }
      V::transpose(v);
      for (int64_t k = 0; k < W && i + k < n; ++k) rows[i + k] = v[k];
    }
  }

  // Of weights, one per column of a row, those of the block that begins at value `start`.
  static const float* weights_of(const Weights& weights, int64_t start) {
    return weights.columns ? weights.values + start % weights.columns : nullptr;
  }

  template <bool kWeighted, class E, class T>
  static void solve_blocks(const T* x, Layout l, const RangeSpec& spec, bool exact, const Weights& weights,
                           float* scale, float* offset) {
    const int64_t n = l.block;
    if (n > kLaneBlock) {
      for (int64_t b = 0; b < l.blocks; ++b) {
        float s[W], o[W];
        const Long<E, T, kWeighted> block{x + b * n, weights_of(weights, weights.first + b * n), n, spec};
        const Found<V> found = solve(block, exact);
        V::store(s, found.scale);
        V::store(o, found.offset);
        scale[b] = s[0];
        offset[b] = o[0];
      }
      return;
    }
    F rows[kLaneBlock];
    F weight_rows[kWeighted ? kLaneBlock : 1];
    for (int64_t b = 0; b < l.blocks; b += W) {
      const int64_t count = l.blocks - b < W ? l.blocks - b : W;
      spread([&](int64_t j) { return x + (b + j) * n; }, n, count, rows);
      if constexpr (kWeighted) {
        spread([&](int64_t j) { return weights_of(weights, weights.first + (b + j) * n); }, n, count, weight_rows);
      }
      const Found<V> found = solve(Short<E, kWeighted>{rows, weight_rows, n, count, spec}, exact);
      float s[W], o[W];
      V::store(s, found.scale);
      V::store(o, found.offset);
      for (int64_t j = 0; j < count; ++j) {
        scale[b + j] = s[j];
        offset[b + j] = o[j];
      }
    }
  }

  template <bool kWeighted>
  static void run(const void* x, Layout l, RangeSpec spec, bool exact, Weights weights, float* scale, float* offset) {
    auto with_type = [&](auto t) {
      const auto* in = static_cast<const decltype(t)*>(x);
      const auto solve_with = [&](auto errors) {
        using E = typename decltype(errors)::type;
        solve_blocks<kWeighted, E>(in, l, spec, exact && E::kInteger, weights, scale, offset);
      };
      if (spec.grid.format == Format::table) return solve_with(Of<CodecErrors<TableCodec<V, 4>>>{});
      if (spec.grid.format != Format::integer) return solve_with(Of<CodecErrors<MinifloatCodec<V>>>{});
      if (spec.rule == Rule::minimum) return solve_with(Of<Errors<Offset::minimum>>{});
      return solve_with(Of<Errors<Offset::zero_point>>{});
    };
    if (l.dtype == Dtype::f32) return with_type(float{});
    if (l.dtype == Dtype::bf16) return with_type(bf16{});
    return with_type(f16{});
  }
  template <class E>
  struct Of {
    using type = E;
  };

  static void search(const void* x, Layout l, RangeSpec spec, bool exact, Weights weights, float* scale,
                     float* offset) {
    return weights.columns ? run<true>(x, l, spec, false, weights, scale, offset)
                           : run<false>(x, l, spec, exact, weights, scale, offset);
  }

  static constexpr SearchKernels table = {.search = search};
};

}  // namespace
}  // namespace phiquant
