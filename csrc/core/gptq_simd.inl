// The step of gptq_ref.cpp over vectors: a tile of four vectors of rows, whose sums stay in registers while
// the errors of the other columns are read from the L1 cache. Included once by each vector level.

#include <cstring>

#include "core/codec.inl"
#include "core/gptq.h"

namespace phiquant {
namespace {

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
        const Codec codec{shared, {scale, Range<V>::inverse(scale), offset}};
        const F error = V::sub(load(g.weight + at + i, n - i), codec.nearest(t[v]));
        V::store(errors[k] + i, error);
        store(g.weight + at + i, error, n - i);
        store_codes(codes + i, codec, t[v], n - i);
      }
    }
  }

  static void run(const GptqRun& g, const Grid& grid, int64_t begin, int64_t end) {
    with_codec<V>(grid, [&]<class Codec>() {
      const typename Codec::Shared shared(grid, 0);
      for (int64_t first = begin; first < end; first += kVectors * W) {
        tile<Codec>(g, shared, first, end - first < kVectors * W ? end - first : kVectors * W);
      }
    });
  }

  static constexpr GptqKernels table = {.run = run};
};

}  // namespace
}  // namespace phiquant
