// The scale of least squared error by a sweep over breakpoints (search.h): where s = |x| / (k - 1/2), the code of x
// grows from k - 1 to k, q.x by |x| and q.q by 2k - 1. The best scale is the largest (q.x)^2 / (q.q) on the way.
//
// Two forms. `LaneSweep`: short blocks and few codes, a block in each lane, sorted by a network, in fp32.
// `sweep_block`: any block, sorted in buckets, in fp64. Both take codes in [low, high], low <= 0 <= high, and give
// a scale s > 0; for s < 0 the caller mirrors low and high, and the signs of x.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/range.inl"

namespace phiquant {
namespace {

template <class V>
class LaneSweep {
 public:
  using F = typename V::F;
  static constexpr int64_t kLongest = 128;
  static constexpr int64_t kMostCodes = 15;  // what five bits of a key hold, of either sign

  static bool fits(int64_t n, float most_codes) { return n <= kLongest && most_codes <= kMostCodes; }

  // The breakpoints of x, rows[i] = value i of each block, sorted: up to `codes` of each value. A key is s, rounded
  // to 19 bits, with the signed code that begins there in its last five. Values are taken in units of a power of 2.
  LaneSweep(const F* x, int64_t n, int64_t codes) {
    const F zero = V::set1(0.0f);
    F peak = zero;
    for (int64_t i = 0; i < n; ++i) peak = V::max(V::abs(x[i]), peak);
    unit_ = V::bit_and(peak, V::bits(0x7f800000u));
    const F inv = V::select(V::less(unit_, V::set1(FLT_MIN)), zero, V::div(V::set1(1.0f), unit_));
    F sizes[kLongest];
    const auto padded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n)));
    for (int64_t i = 0; i < padded; ++i) {  // the last bit holds the sign
      sizes[i] = i < n ? V::bit_or(V::bit_and(V::mul(V::abs(x[i]), inv), V::bits(~1u)),
                                   V::select(V::less(x[i], zero), V::bits(1u), zero))
                       : zero;
    }
    merge_up(sizes, 1, padded);
    const auto lists = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(codes)));
    total_ = padded * lists;
    for (int64_t k = 1; k <= codes; ++k) {
      const F part = V::set1(1.0f / (static_cast<float>(k) - 0.5f));
      const F above = V::bits(static_cast<uint32_t>(16 + k));
      const F below = V::bits(static_cast<uint32_t>(16 - k));
      for (int64_t i = 0; i < padded; ++i) {
        const F s = V::mul(sizes[i], part);
        const F c = V::mul(s, V::set1(33.0f));
        const F rounded = V::sub(c, V::sub(c, s));
        const F negative = V::bit_and(sizes[i], V::bits(1u));
        keys_[(k - 1) * padded + i] = V::bit_or(rounded, V::select(V::less(zero, negative), below, above));
      }
    }
    for (int64_t i = codes * padded; i < total_; ++i) keys_[i] = zero;
    merge_up(keys_, padded, total_);
  }

  // The best scale for codes in [low, high]; `sign` 1 or -1 is that of x.
  F fit(F low, F high, float sign) const {
    const F one = V::set1(1.0f);
    const F half = V::set1(0.5f);
    const F flip = V::set1(sign);
    F qx = V::set1(0.0f), qq = qx, best_qx = qx, best_square = qx, best_qq = one;
    for (int64_t i = total_ - 1; i >= 0; --i) {  // from the largest scale down
      const F s = V::bit_and(keys_[i], V::bits(~31u));
      const F integer = V::bit_or(V::bit_and(keys_[i], V::bits(31u)), V::bits(0x4b000000u));  // 2^23 + code + 16
      const F code = V::mul(V::sub(integer, V::set1(8388608.0f + 16.0f)), flip);
      const F size = V::abs(code);
      qx = V::add(qx, V::select_in_range(code, low, high, V::mul(s, V::sub(size, half))));
      qq = V::add(qq, V::select_in_range(code, low, high, V::sub(V::add(size, size), one)));
      const F square = V::mul(qx, qx);
      const auto better = V::less(V::mul(best_square, qq), V::mul(square, best_qq));
      best_qx = V::select(better, qx, best_qx);
      best_qq = V::select(better, qq, best_qq);
      best_square = V::select(better, square, best_square);
    }
    return V::mul(V::div(best_qx, best_qq), unit_);
  }

 private:
  // Sorted runs of `from` rows become one of `to`, both powers of 2, smallest first: bitonic merges, the first stage
  // of each mirrored.
  static void merge_up(F* rows, int64_t from, int64_t to) {
    for (int64_t run = 2 * from; run <= to; run *= 2) {
      for (int64_t start = 0; start < to; start += run) {
        for (int64_t i = 0; i < run / 2; ++i) order(rows[start + i], rows[start + run - 1 - i]);
      }
      int64_t stride = run / 4;
      for (; stride >= 4; stride /= 8) clean<8>(rows, to, stride / 4);
      if (stride == 2) clean<4>(rows, to, 1);
      if (stride == 1) clean<2>(rows, to, 1);
    }
  }

  // The stages of strides kRows / 2 * stride down to stride, on kRows rows at a time, held in registers.
  template <int kRows>
  static void clean(F* rows, int64_t to, int64_t stride) {
    for (int64_t start = 0; start < to; start += kRows * stride) {
      for (int64_t i = start; i < start + stride; ++i) {
        F r[kRows];
        for (int j = 0; j < kRows; ++j) r[j] = rows[i + j * stride];
        for (int half = kRows / 2; half > 0; half /= 2) {
          for (int j = 0; j < kRows; ++j) {
            if ((j & half) == 0) order(r[j], r[j + half]);
          }
        }
        for (int j = 0; j < kRows; ++j) rows[i + j * stride] = r[j];
      }
    }
  }

  static void order(F& a, F& b) {
    const F least = V::min(a, b);
    b = V::max(a, b);
    a = least;
  }

  F unit_;
  int64_t total_;
  F keys_[kLongest * (kMostCodes + 1)];
};

// A breakpoint at 1 / s = inverse of a value of magnitude `size`.
struct Break {
  float inverse;
  float size;
  bool operator<(const Break& other) const {
    return inverse != other.inverse ? inverse < other.inverse : size < other.size;
  }
};
struct Bucket {
  int64_t end;
};
constexpr int64_t kMostBreaks = int64_t{1} << 22;

// A scale below which the values beyond low s and high s alone have a larger squared error than `error`: by bisection,
// so it is not the largest such scale.
template <class Value>
double smallest_scale(int64_t n, Value value, double low, double high, double peak, double error) {
  const double reach = high > -low ? high : -low;
  double below = 0.0;
  double above = peak / reach;
  for (int i = 0; i < 10; ++i) {
    const double s = 0.5 * (below + above);
    double clipped = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      const double v = value(j);
      const double over = v - s * high > 0.0 ? v - s * high : v - s * low < 0.0 ? v - s * low : 0.0;
      clipped += over * over;
    }
    (clipped > error ? below : above) = s;
  }
  return below;
}

// What sweeps of several blocks share: memory.
struct SweepMemory {
  std::vector<Bucket> buckets;
  std::vector<Break> breaks;
};

// The best scale for n values, value(i) the i-th, and codes in [low, high]; 0 if there are more than kMostBreaks
// breakpoints or a value is not finite. `error` is one that some scale has: a scale that clips more than that away is
// not looked at.
template <class Value>
double sweep_block(int64_t n, Value value, double low, double high, double error, SweepMemory& memory) {
  double top = 0.0;
  double bottom = 0.0;
  double poison = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double v = value(i);
    poison += 0.0 * v;
    top = v > top ? v : top;
    bottom = v < bottom ? v : bottom;
  }
  if (poison != 0.0) return 0.0;  // NaN: a value is not finite
  const double smallest = smallest_scale(n, value, low, high, top > -bottom ? top : -bottom, error);
  const auto steps = [&](double v) {
    const double limit = v < 0.0 ? -low : high;
    const double reached = smallest > 0.0 ? std::floor(std::fabs(v) / smallest + 0.5) : limit;
    return v == 0.0 ? int64_t{0} : static_cast<int64_t>(reached < limit ? reached : limit);
  };
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += steps(value(i));
  if (total == 0 || total > kMostBreaks) return 0.0;

  const double peak = top > -bottom ? top : -bottom;
  const double last = smallest > 0.0 ? 1.0 / smallest : (high > -low ? high : -low) / peak;
  const double per_bucket = static_cast<double>(total) / last;
  const auto bucket_of = [&](float inverse) {
    const double b = static_cast<double>(inverse) * per_bucket;
    return b < static_cast<double>(total - 1) ? static_cast<int64_t>(b) : total - 1;
  };
  std::vector<Bucket>& buckets = memory.buckets;
  std::vector<Break>& breaks = memory.breaks;
  buckets.assign(static_cast<size_t>(total) + 1, Bucket{0});
  breaks.resize(static_cast<size_t>(total));
  const auto each = [&](auto use) {
    for (int64_t i = 0; i < n; ++i) {
      const double v = value(i);
      const auto size = static_cast<float>(std::fabs(v));
      const double inv = 1.0 / std::fabs(v);
      for (int64_t k = 1, most = steps(v); k <= most; ++k) {
        use(Break{static_cast<float>((static_cast<double>(k) - 0.5) * inv), size});
      }
    }
  };
  each([&](Break b) { ++buckets[static_cast<size_t>(bucket_of(b.inverse)) + 1].end; });
  for (size_t b = 1; b < buckets.size(); ++b) buckets[b].end += buckets[b - 1].end;
  each([&](Break b) { breaks[static_cast<size_t>(buckets[static_cast<size_t>(bucket_of(b.inverse))].end++)] = b; });
  double qx = 0.0, qq = 0.0, best_qx = 0.0, best_qq = 1.0;
  int64_t begin = 0;
  for (const Bucket& bucket : buckets) {
    if (bucket.end - begin > 1) std::sort(breaks.begin() + begin, breaks.begin() + bucket.end);
    for (; begin < bucket.end; ++begin) {
      const Break b = breaks[static_cast<size_t>(begin)];
      qx += b.size;
      qq += 2.0 * std::nearbyint(static_cast<double>(b.inverse) * b.size + 0.5) - 1.0;
      if (qx * qx * best_qq > best_qx * best_qx * qq) {
        best_qx = qx;
        best_qq = qq;
      }
    }
  }
  return best_qx / best_qq;
}

}  // namespace
}  // namespace phiquant
