// How values become codes and codes values, over vectors V: one policy per kind of element, for the
// kernels of affine_simd.inl and gptq_simd.inl. Each knows
//   Shared          what blocks have in common
//   nearest(x)      the value of x's code        store(p, x)  the codes of x
//   load(p)         the values of codes          pass(x, g)   g where the estimator passes it, else 0
// Scale, inverse and offset are vectors: a block, or a block in each lane. Loops call these for every
// vector, so they are inlined whatever their number is: with calls, large tables took twice the time.
#pragma once

#include <limits>

#include "core/range.inl"

namespace phiquant {
namespace {

template <class V>
struct BlockGrid {
  typename V::F scale, inverse, offset;
};

template <class V, Offset kOffset>
struct IntegerCodec {
  using F = typename V::F;
  struct Shared {
    F qmin, qmax;
    bool code_signed;
    Shared(const Grid& g, int64_t) : qmin(V::set1(g.qmin)), qmax(V::set1(g.qmax)), code_signed(g.qmin < 0.0f) {}
  };
  const Shared& grid;
  BlockGrid<V> block;

  F unclamped(F x) const {
    if constexpr (kOffset == Offset::minimum) return V::round(V::mul(V::sub(x, block.offset), block.inverse));
    return V::add(V::round(V::mul(x, block.inverse)), block.offset);
  }
  F code(F x) const { return V::min(V::max(unclamped(x), grid.qmin), grid.qmax); }
  F value(F q) const {
    if constexpr (kOffset == Offset::minimum) return V::add(V::mul(block.scale, q), block.offset);
    return V::mul(block.scale, V::sub(q, block.offset));
  }
  [[gnu::always_inline]] F nearest(F x) const { return value(code(x)); }
  [[gnu::always_inline]] void store(int8_t* p, F x) const { V::store_codes(p, code(x)); }
  [[gnu::always_inline]] F load(const int8_t* p) const { return value(V::load_codes(p, grid.code_signed)); }
  [[gnu::always_inline]] F pass(F x, F g) const { return V::select_in_range(unclamped(x), grid.qmin, grid.qmax, g); }
};

// Adding 1.5 * 2^(e + 23 - fraction) to a value in [2^e, 2^(e+1)) leaves no more of it than the format's
// fraction: the addition itself rounds. A value scaled by 2^(-126 - emin) has the format's subnormals where fp32 has
// its own, so that the format's bits are the upper bits of the float.
template <class V>
struct MinifloatCodec {
  using F = typename V::F;
  using I = typename V::I;
  struct Shared {
    F lowest, largest, low, high, smallest_normal, rounder, down, up, special;
    int shift, sign;  // how far the fraction and the sign of a code are from their place in a float
    I magnitude;
    Shared(const Grid& g, int64_t) {
      const Minifloat& f = kMinifloats[static_cast<int>(g.format)];
      lowest = V::set1(-f.largest);
      largest = V::set1(f.largest);
      low = V::set1(-f.reach);
      high = V::set1(f.reach);
      smallest_normal = V::set1(power(f.emin));
      rounder = V::set1(1.5f * power(23 - f.fraction));
      down = V::set1(power(-126 - f.emin));
      up = V::set1(power(126 + f.emin));
      special = V::set1(f.special);
      shift = 23 - f.fraction;
      sign = 31 - f.exponent - f.fraction;
      magnitude = V::set1i((1 << (f.exponent + f.fraction)) - 1);
    }
    static float power(int e) {  // 2^e, e >= -149
      return __builtin_bit_cast(float, e >= -126 ? (e + 127) << 23 : 1 << (e + 149));
    }
  };
  const Shared& grid;
  BlockGrid<V> block;

  [[gnu::always_inline]] F level(F x) const {
    const F t = V::min(V::max(V::mul(x, block.inverse), grid.lowest), grid.largest);
    const F binade = V::max(V::bit_and(t, V::set1(std::numeric_limits<float>::infinity())), grid.smallest_normal);
    const F c = V::mul(binade, grid.rounder);
    return V::copy_sign(V::sub(V::add(t, c), c), t);
  }
  [[gnu::always_inline]] F nearest(F x) const { return V::mul(block.scale, level(x)); }
  [[gnu::always_inline]] void store(int8_t* p, F x) const {
    const I bits = V::bits(V::mul(level(x), grid.down));
    const I magnitude = V::bit_and(V::shift_right(bits, grid.shift), grid.magnitude);
    const I sign = V::shift_left(V::shift_right(bits, 31), 31 - grid.sign);
    V::store_codes(p, V::bit_or(magnitude, sign));
  }
  [[gnu::always_inline]] F load(const int8_t* p) const {
    const I code = V::load_bytes(p);
    F v = V::mul(V::floats(V::shift_left(V::bit_and(code, grid.magnitude), grid.shift)), grid.up);
    const F beyond = V::select(V::less(v, grid.special), V::set1(std::numeric_limits<float>::infinity()),
                               V::set1(std::numeric_limits<float>::quiet_NaN()));
    v = V::select(V::less(grid.largest, v), beyond, v);
    return V::mul(block.scale, V::copy_sign(v, V::floats(V::shift_left(code, grid.sign))));
  }
  [[gnu::always_inline]] F pass(F x, F g) const {
    return V::select_in_range(V::mul(x, block.inverse), grid.low, grid.high, g);
  }
};

// A search tree of kDepth steps over up to 2^kDepth levels. Nodes lie as in a heap: the children of h are
// 2 h and 2 h + 1, the leaf of code q is 2^kDepth + q. Missing nodes are NaN, which nothing exceeds.
template <class V, int kDepth>
struct TableCodec {
  using F = typename V::F;
  using I = typename V::I;
  using Mask = typename V::Mask;
  static constexpr int kLeaves = 1 << kDepth;
  static constexpr int kFloats = kLeaves < 16 ? 16 : kLeaves;  // a whole vector can be loaded
  struct Shared {
    alignas(64) float nodes[kFloats];
    alignas(64) float levels[kFloats];
    F low, high;
    int size;
    Shared(const Grid& g, int64_t b) : size(g.size) {
      const float* from = g.levels + (g.per_block ? b * g.size : 0);
      for (int q = 0; q < kFloats; ++q) levels[q] = from[q % kLeaves < size ? q % kLeaves : size - 1];
      nodes[0] = 0.0f;
      for (int depth = 0; depth < kDepth; ++depth) {
        const int step = kLeaves >> depth;  // leaves below a node of this depth
        for (int i = 0; i < 1 << depth; ++i) {
          const int right = i * step + step / 2;  // the first leaf of its right half
          nodes[(1 << depth) + i] =
              right < size ? bound(levels[right - 1], levels[right]) : std::numeric_limits<float>::quiet_NaN();
        }
      }
      low = V::set1(levels[0] - (levels[1] - levels[0]) * 0.5f);
      high = V::set1(levels[size - 1] + (levels[size - 1] - levels[size - 2]) * 0.5f);
    }
    // The smallest float that is as near to the upper level as to the lower.
    static float bound(float lower, float upper) {
      const double middle = (static_cast<double>(lower) + static_cast<double>(upper)) * 0.5;
      const float rounded = static_cast<float>(middle);
      const int bits = __builtin_bit_cast(int, rounded);
      const int up = 1 | bits >> 31;  // to the next float, away from zero or towards it
      return __builtin_bit_cast(float, static_cast<double>(rounded) < middle ? bits + up : bits);
    }
  };
  const Shared& grid;
  BlockGrid<V> block;

  // 2^kDepth + the code; path[i] is the decision of step i, the bits of the code from the highest down
  [[gnu::always_inline]] I leaf(F x, Mask* path) const {
    const F t = V::mul(x, block.inverse);
    path[0] = V::less_equal(V::set1(grid.nodes[1]), t);
    I h = V::count(V::set1i(2), path[0]);
    descend<1>(t, h, path);
    return h;
  }
  template <int kAt>
  [[gnu::always_inline]] void descend(F t, I& h, Mask* path) const {
    if constexpr (kAt < kDepth) {
      // up to depth 3 all nodes lie in the first 16 floats, where h itself is the place
      const F node =
          kAt < 4 ? V::template lookup<4>(grid.nodes, h) : V::template lookup<kAt>(grid.nodes + (1 << kAt), h, path);
      path[kAt] = V::less_equal(node, t);
      h = V::count(V::add(h, h), path[kAt]);
      descend<kAt + 1>(t, h, path);
    }
  }
  [[gnu::always_inline]] F nearest(F x) const {
    Mask path[kDepth];
    const I h = leaf(x, path);
    return V::mul(block.scale, V::template lookup<kDepth>(grid.levels, h, path));
  }
  [[gnu::always_inline]] void store(int8_t* p, F x) const {
    Mask path[kDepth];
    V::store_codes(p, V::sub(leaf(x, path), V::set1i(kLeaves)));
  }
  [[gnu::always_inline]] F load(const int8_t* p) const {
    const I code = V::min(V::load_bytes(p), V::set1i(grid.size - 1));
    return V::mul(block.scale, V::template lookup<kDepth>(grid.levels, code));
  }
  [[gnu::always_inline]] F pass(F x, F g) const {
    return V::select_in_range(V::mul(x, block.inverse), grid.low, grid.high, g);
  }
};

// Calls f.operator()<codec>() with the codec of `grid`.
template <class V, class Body>
void with_codec(const Grid& grid, Body f) {
  if (grid.format == Format::integer) {
    if (grid.offset == Offset::minimum) return f.template operator()<IntegerCodec<V, Offset::minimum>>();
    return f.template operator()<IntegerCodec<V, Offset::zero_point>>();
  }
  if (grid.format != Format::table) return f.template operator()<MinifloatCodec<V>>();
  if (grid.size <= 16) return f.template operator()<TableCodec<V, 4>>();
  if (grid.size <= 64) return f.template operator()<TableCodec<V, 6>>();
  return f.template operator()<TableCodec<V, 8>>();
}

}  // namespace
}  // namespace phiquant
