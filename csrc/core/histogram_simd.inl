// The kernels of histogram_ref.cpp over vectors of V::width floats; included once by each vector level.
//
// A chunk at a time: its extremes first (dyadic), then the bin of each value as 16 bits into a buffer, then the
// counting, which no vector instruction helps: kTables tables in turn keep a counter from waiting for itself.
#include <cfloat>
#include <cstring>
#include <limits>

#include "core/histogram.h"

namespace phiquant {
namespace {

template <class V>
struct Histogram {
  using F = typename V::F;
  static constexpr int64_t W = V::width;
  static constexpr int64_t kChunk = 2048;
  static constexpr float kInf = std::numeric_limits<float>::infinity();

  template <class T>
  static F load(const T* x, int64_t i, int64_t n) {  // missing lanes are NaN, which is passed over
    if (i + W <= n) return V::load(x + i);
    float values[W];
    T buffer[W] = {};
    std::memcpy(buffer, x + i, static_cast<size_t>(n - i) * sizeof(T));
    V::store(values, V::load(buffer));
    for (int64_t k = n - i; k < W; ++k) values[k] = std::numeric_limits<float>::quiet_NaN();
    return V::load(values);
  }

  // tables[k % kTables][places[k]] += 1.
  static void count(const uint16_t* places, int64_t n, int32_t* tables, int64_t length) {
    static_assert(kTables == 4);
    int32_t* t0 = tables;
    int32_t* t1 = t0 + length;
    int32_t* t2 = t1 + length;
    int32_t* t3 = t2 + length;
    for (int64_t k = 0; k < n; k += 4) {
      uint64_t four;
      std::memcpy(&four, places + k, 8);
      ++t0[four & 0xffff];
      ++t1[four >> 16 & 0xffff];
      ++t2[four >> 32 & 0xffff];
      ++t3[four >> 48];
    }
  }

  template <class T>
  static void linear(const T* x, int64_t n, LinearBins b, int32_t* tables) {
    const F lo = V::set1(b.lo);
    const F hi = V::set1(b.hi);
    const F bins = V::set1(static_cast<float>(b.bins));
    const F last = V::set1(static_cast<float>(b.bins - 1));
    const F width = V::set1(b.hi - b.lo);
    const F outside = V::set1(-1.0f);  // as an unsigned number beyond all bins
    uint16_t places[kChunk];
    for (int64_t start = 0; start < n; start += kChunk) {
      const int64_t length = n - start < kChunk ? n - start : kChunk;
      for (int64_t i = 0; i < length; i += W) {
        const F v = load(x + start, i, length);
        const F place = V::min(V::div(V::mul(V::sub(v, lo), bins), width), last);
        const F inside = V::select(V::less_equal(lo, v), V::select(V::less_equal(v, hi), place, outside), outside);
        V::store_bins(places + i, inside, static_cast<int>(b.bins));
      }
      count(places, length, tables, table_length(b.bins));
    }
  }

  // Smallest, largest and largest absolute of the finite values.
  struct Extremes {
    float lo, hi, absmax;
  };

  template <class T>
  static Extremes extremes(const T* x, int64_t n) {
    const F biggest = V::set1(FLT_MAX);
    const F none = V::set1(kInf);
    const F minus_none = V::set1(-kInf);
    F lows[2] = {none, none};
    F highs[2] = {minus_none, minus_none};
    for (int64_t i = 0, k = 0; i < n; i += W, k ^= 1) {
      const F v = load(x, i, n);
      const auto finite = V::less_equal(V::abs(v), biggest);
      lows[k] = V::min(V::select(finite, v, none), lows[k]);
      highs[k] = V::max(V::select(finite, v, minus_none), highs[k]);
    }
    Extremes e{};
    V::horizontal(V::min(lows[0], lows[1]), V::max(highs[0], highs[1]), e.lo, e.hi);
    if (e.lo <= e.hi) e.absmax = -e.lo > e.hi ? -e.lo : e.hi;
    return e;
  }

  template <class T>
  static void dyadic(const T* x, int64_t n, DyadicBins& b) {
    const int64_t length = table_length(2 * b.bins);
    uint16_t places[kChunk];
    for (int64_t start = 0; start < n; start += kChunk) {
      const int64_t m = n - start < kChunk ? n - start : kChunk;
      const Extremes e = extremes(x + start, m);
      b.lo = e.lo < b.lo ? e.lo : b.lo;
      b.hi = e.hi > b.hi ? e.hi : b.hi;
      const int needed = dyadic_exponent(e.absmax, b.bins);
      if (needed > b.exponent) coarsen(b, needed);
      const F scale = V::set1(power_of_two(-b.exponent));
      for (int64_t i = 0; i < m; i += W) {
        V::store_signed_bins(places + i, V::mul(load(x + start, i, m), scale), static_cast<int>(b.bins));
      }
      count(places, m, b.tables, length);
    }
    b.lo += 0.0f;
    b.hi += 0.0f;
  }

  static float power_of_two(int exponent) {  // -126 <= exponent <= 126: a normal number
    const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  }

  template <class Body>
  static void with(const void* x, Dtype dtype, Body f) {
    switch (dtype) {
      case Dtype::f32:
        return f(static_cast<const float*>(x));
      case Dtype::bf16:
        return f(static_cast<const bf16*>(x));
      case Dtype::f16:
        return f(static_cast<const f16*>(x));
    }
  }

  static void linear_any(const void* x, Dtype dtype, int64_t n, LinearBins b, int32_t* tables) {
    with(x, dtype, [&](const auto* values) { linear(values, n, b, tables); });
  }
  static void dyadic_any(const void* x, Dtype dtype, int64_t n, DyadicBins& b) {
    with(x, dtype, [&](const auto* values) { dyadic(values, n, b); });
  }

  static constexpr HistogramKernels table = {.linear = linear_any, .dyadic = dyadic_any};
};

}  // namespace
}  // namespace phiquant
