// Values to sorted distinct points, and their prefix sums.
#include <algorithm>
#include <bit>
#include <type_traits>
#include <utility>

#include "core/half.h"
#include "core/kmeans.h"

namespace phiquant {
namespace {

constexpr uint32_t kSign = 0x80000000u;
// Tasks that share one pass over the values: fixed, so that sums do not depend on the number of threads.
constexpr int64_t kTasks = 8;
// Below this, clearing and reading a table of all 16-bit values costs more than sorting does.
constexpr int64_t kCountFrom = 1 << 15;

// Unsigned integers in the order of the floats; -0 becomes 0.
inline uint32_t to_key(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x + 0.0f);
  return u & kSign ? ~u : u | kSign;
}
inline float from_key(uint32_t key) { return std::bit_cast<float>(key & kSign ? key & ~kSign : ~key); }

template <class T>
T read(const void* p, int64_t i) {
  return static_cast<const T*>(p)[i];
}

template <class Body>
void with_type(Dtype dtype, Body body) {
  if (dtype == Dtype::f32) return body(float{});
  if (dtype == Dtype::bf16) return body(bf16{});
  body(f16{});
}

// What is sorted: the key in the upper half; below it the weight's bits, or nothing.
inline uint32_t key_of(uint32_t e) { return e; }
inline uint32_t key_of(uint64_t e) { return static_cast<uint32_t>(e >> 32); }
inline double weight_of(uint32_t) { return 1.0; }
inline double weight_of(uint64_t e) { return std::bit_cast<float>(static_cast<uint32_t>(e)); }

// By key, least significant digit first: three stable passes of 11 bits, those without a difference skipped.
template <class E>
void radix_sort(LargeVector<E>& entries) {
  constexpr int kBits = 11;
  constexpr uint32_t kBins = 1u << kBits;
  std::vector<uint32_t> counts(3 * kBins);
  for (const E e : entries) {
    for (uint32_t pass = 0; pass < 3; ++pass) ++counts[pass * kBins + (key_of(e) >> (pass * kBits) & (kBins - 1))];
  }
  LargeVector<E> other(entries.size());
  for (uint32_t pass = 0; pass < 3; ++pass) {
    uint32_t* places = &counts[pass * kBins];
    const uint32_t first = key_of(entries[0]) >> (pass * kBits) & (kBins - 1);
    if (places[first] == entries.size()) continue;
    uint32_t sum = 0;
    for (uint32_t bin = 0; bin < kBins; ++bin) sum += std::exchange(places[bin], sum);
    for (const E e : entries) other[places[key_of(e) >> (pass * kBits) & (kBins - 1)]++] = e;
    entries.swap(other);
  }
}

// Points of sorted entries.
template <class E>
Points merge(const LargeVector<E>& entries, bool skip_zero) {
  Points points;
  points.value.reserve(entries.size());
  points.weight.reserve(entries.size());
  for (size_t i = 0; i < entries.size();) {
    const uint32_t key = key_of(entries[i]);
    double weight = 0.0;
    for (; i < entries.size() && key_of(entries[i]) == key; ++i) weight += weight_of(entries[i]);
    if (skip_zero && key == kSign) continue;
    points.value.push_back(from_key(key));
    points.weight.push_back(weight);
  }
  return points;
}

template <class E>
Points sort_and_merge(LargeVector<E>& entries, bool skip_zero) {
  if (entries.size() < 1024) {
    std::sort(entries.begin(), entries.end());
  } else {
    radix_sort(entries);
  }
  return merge(entries, skip_zero);
}

Points by_sorting(const void* x, Dtype dtype, const float* weights, int64_t n, bool skip_zero) {
  Points points;
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    if (!weights) {
      LargeVector<uint32_t> entries(static_cast<size_t>(n));
      for (int64_t i = 0; i < n; ++i) entries[i] = to_key(to_float(read<T>(x, i)));
      points = sort_and_merge(entries, skip_zero);
      return;
    }
    LargeVector<uint64_t> entries;
    entries.reserve(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      if (weights[i] == 0.0f) continue;
      entries.push_back(uint64_t{to_key(to_float(read<T>(x, i)))} << 32 | std::bit_cast<uint32_t>(weights[i]));
    }
    points = sort_and_merge(entries, skip_zero);
  });
  return points;
}

// One table of all 16-bit values for each task, then their sum in the order of the values.
template <class T, class Count>
Points by_counting(const T* x, const float* weights, int64_t n, bool skip_zero, const Parallel& parallel) {
  constexpr int64_t kValues = 1 << 16;
  std::vector<Count> tables(static_cast<size_t>(kTasks * kValues));
  parallel(kTasks, [&](int64_t task) {
    Count* table = &tables[task * kValues];
    const int64_t end = (task + 1) * n / kTasks;
    for (int64_t i = task * n / kTasks; i < end; ++i) {
      if constexpr (std::is_floating_point_v<Count>) {
        table[x[i].bits] += weights[i];
      } else {
        ++table[x[i].bits];
      }
    }
  });
  Points points;
  double zeros = 0.0;
  auto add = [&](uint32_t bits) {
    double weight = 0.0;
    for (int64_t task = 0; task < kTasks; ++task) weight += static_cast<double>(tables[task * kValues + bits]);
    if (weight == 0.0) return;
    const float value = to_float(T{static_cast<uint16_t>(bits)});
    if (value == 0.0f) {  // both zeros are one point
      zeros += weight;
    } else {
      points.value.push_back(value);
      points.weight.push_back(weight);
    }
  };
  for (uint32_t bits = 0xffff; bits >= 0x8000; --bits) add(bits);
  add(0);
  if (zeros > 0.0 && !skip_zero) {
    points.value.push_back(0.0f);
    points.weight.push_back(zeros);
  }
  for (uint32_t bits = 1; bits < 0x8000; ++bits) add(bits);
  return points;
}

}  // namespace

Points distinct(const void* x, Dtype dtype, const float* weights, int64_t n, bool skip_zero, const Parallel& parallel) {
  if (weights && std::all_of(weights, weights + n, [](float h) { return h == 0.0f; })) weights = nullptr;
  if (dtype == Dtype::f32 || n < kCountFrom) return by_sorting(x, dtype, weights, n, skip_zero);
  Points points;
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, float>) {
      const T* values = static_cast<const T*>(x);
      points = weights ? by_counting<T, double>(values, weights, n, skip_zero, parallel)
                       : by_counting<T, uint32_t>(values, weights, n, skip_zero, parallel);
    }
  });
  return points;
}

Prefix::Prefix(const Points& points, const Parallel& parallel)
    : center(0.0), w(points.value.size() + 1), s1(points.value.size() + 1), s2(points.value.size() + 1) {
  const int64_t n = points.size();
  const int64_t middle = n / 2;
  if (n > 0) center = points.value[middle];
  w[middle] = s1[middle] = s2[middle] = 0.0;
  auto step = [&](int64_t from, int64_t to, int64_t point, double sign) {
    const double v = points.value[point] - center;
    const double h = sign * points.weight[point];
    w[to] = w[from] + h;
    s1[to] = s1[from] + h * v;
    s2[to] = s2[from] + h * v * v;
  };
  parallel(2, [&](int64_t half) {
    if (half == 0) {
      for (int64_t i = middle; i > 0; --i) step(i, i - 1, i - 1, -1.0);
    } else {
      for (int64_t i = middle; i < n; ++i) step(i, i + 1, i, 1.0);
    }
  });
}

double Prefix::cost(int64_t i, int64_t j) const {
  if (i >= j) return 0.0;
  const double s = s1[j] - s1[i];
  const double cost = s2[j] - s2[i] - s * s / (w[j] - w[i]);
  return cost > 0.0 ? cost : 0.0;
}

}  // namespace phiquant
