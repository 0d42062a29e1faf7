// The step of gptq_ref.cpp over vectors: a tile of four vectors of rows, whose sums stay in registers while
// the errors of the other columns are read from the L1 cache. Included once by each vector level.

#include <concepts>
#include <cstring>
#include <vector>

#include "core/codec.inl"
#include "core/gptq.h"

namespace phiquant {
namespace {

// A table of levels in each lane, for the groups of columns of a run. They lie across lanes: level q of the rows,
// then from `size` on the bounds from which q is nearer than q - 1.
template <class V>
struct LaneTables {
  using F = typename V::F;
  using Table = TableCodec<V, 4>;
  struct Shared {
    const GptqRun& run;
    const Grid& grid;
    int64_t begin, rows;
    std::vector<std::vector<float>> groups;

    Shared(const GptqRun& run, const Grid& grid, int64_t begin, int64_t end)
        : run(run), grid(grid), begin(begin), rows(end - begin) {
      for (int64_t k = 0; k < run.columns; ++k) {
        const auto group = static_cast<size_t>(run.column[k] / run.group);
        if (groups.size() <= group) groups.resize(group + 1);
        if (groups[group].empty()) groups[group] = across_lanes(grid.levels + group * run.rows * grid.size);
      }
    }
    std::vector<float> across_lanes(const float* levels) const {
      const int64_t size = grid.size;
      std::vector<float> table(static_cast<size_t>(2 * size * rows + V::width));  // whole vectors can be loaded
      for (int64_t n = 0; n < rows; ++n) {
        const float* own = levels + (begin + n) * size;
        for (int64_t q = 0; q < size; ++q) {
          table[q * rows + n] = own[q];
          if (q > 0) table[(size + q) * rows + n] = Table::Shared::bound(own[q - 1], own[q]);
        }
      }
      return table;
    }
  };
  const Shared& shared;
  BlockGrid<V> block;
  const float* levels;  // of the first lane's row

  // The value of x's code, or with the numbers 0, 1, ... as levels the code.
  template <class Level>
  [[gnu::always_inline]] F walk(F x, Level level) const {
    const F t = V::mul(x, block.inverse);
    F found = level(0);
    for (int64_t q = 1; q < shared.grid.size; ++q) {
      const F bound = V::load(levels + (shared.grid.size + q) * shared.rows);
      found = V::select(V::less_equal(bound, t), level(q), found);
    }
    return found;
  }
  [[gnu::always_inline]] F nearest(F x) const {
    return V::mul(block.scale, walk(x, [&](int64_t q) { return V::load(levels + q * shared.rows); }));
  }
  [[gnu::always_inline]] void store(int8_t* p, F x) const {
    V::store_codes(p, walk(x, [](int64_t q) { return V::set1(static_cast<float>(q)); }));
  }
};

template <class V>
struct Gptq {
  using F = typename V::F;
  static constexpr int64_t W = V::width;
  static constexpr int64_t kVectors = 4;

  // The first n of W values; the rest are zero.
  static F load(const float* p, int64_t n) {
    if (n >= W) return V::load(p);
    float buffer[W] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return V::load(buffer);
  }
  static void store(float* p, F v, int64_t n) {
    if (n >= W) return V::store(p, v);
    float buffer[W];
    V::store(buffer, v);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
  }
  template <class Codec>
  static void store_codes(int8_t* p, const Codec& codec, F x, int64_t n) {
    if (n >= W) return codec.store(p, x);
    int8_t buffer[W];
    codec.store(buffer, x);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
  }

  // How the rows from `first` on are coded in the column at `place`.
  template <class Codec>
  static Codec codec_at(const GptqRun& g, const typename Codec::Shared& shared, BlockGrid<V> block, int64_t place,
                        int64_t first) {
    if constexpr (std::same_as<Codec, LaneTables<V>>) {
      return {shared, block, shared.groups[static_cast<size_t>(place / g.group)].data() + first - shared.begin};
    } else {
      return {shared, block};
    }
  }

  // Rows first to first + n, n <= kVectors * W.
  template <class Codec>
  static void tile(const GptqRun& g, const typename Codec::Shared& shared, int64_t first, int64_t n) {
    float errors[kGptqColumns][kVectors * W];
    for (int64_t k = g.columns - 1; k >= 0; --k) {
      const int64_t at = k * g.rows + first;
      F t[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) t[v] = load(g.target + at + v * W, n - v * W);
      for (int64_t j = g.columns - 1; j > k; --j) {
        const F f = V::set1(g.feedback[k * g.columns + j]);
        for (int64_t v = 0; v < kVectors; ++v) t[v] = V::add(t[v], V::mul(f, V::load(errors[j] + v * W)));
      }
      const int64_t parameters = g.column[k] / g.group * g.rows + first;
      int8_t* codes = g.codes + g.column[k] * g.rows + first;
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t i = v * W;
        const F offset = g.offset ? load(g.offset + parameters + i, n - i) : V::set1(0.0f);
        const F scale = load(g.scale + parameters + i, n - i);
        const BlockGrid<V> block = {scale, Range<V>::inverse(scale), offset};
        const Codec codec = codec_at<Codec>(g, shared, block, g.column[k], first + (i < n ? i : 0));
        const F error = V::sub(load(g.weight + at + i, n - i), codec.nearest(t[v]));
        V::store(errors[k] + i, error);
        store(g.weight + at + i, error, n - i);
        store_codes(codes + i, codec, t[v], n - i);
      }
    }
  }

  template <class Codec>
  static void tiles(const GptqRun& g, const typename Codec::Shared& shared, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kVectors * W) {
      tile<Codec>(g, shared, first, end - first < kVectors * W ? end - first : kVectors * W);
    }
  }
  static void run(const GptqRun& g, const Grid& grid, int64_t begin, int64_t end) {
    if (grid.per_block) return tiles<LaneTables<V>>(g, {g, grid, begin, end}, begin, end);
    with_codec<V>(grid, [&]<class Codec>() { tiles<Codec>(g, {grid, 0}, begin, end); });
  }

  static constexpr GptqKernels table = {.run = run};
};

}  // namespace
}  // namespace phiquant
