// k-means of numbers: the k levels C that minimise  sum_i h_i (x_i - C[code_i])^2,  h = 1 or a weight per value.
//
// On a line a cluster is a run of the sorted values. So values are first turned into sorted distinct
// points; prefix sums over them give the error of any run, sum h x^2 - (sum h x)^2 / sum h, in three
// subtractions, and no method below looks at the values again.
//
// Levels are ascending and float32. Where there are fewer distinct values than levels, the largest
// level is repeated. Values are finite, weights finite and not negative. Results do not depend on the CPU level or on
// the number of threads.
#pragma once

#include <cstdint>
#include <functional>

#include "core/large_pages.h"
#include "core/types.h"

namespace phiquant {

// Runs task(0) .. task(count - 1), in any order, perhaps at once.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& task)>;

// In turn.
inline void serial(int64_t count, const std::function<void(int64_t)>& task) {
  for (int64_t i = 0; i < count; ++i) task(i);
}

// Sorted distinct values and the weight of each (without weights: how often it occurs).
struct Points {
  LargeVector<float> value;
  LargeVector<double> weight;

  int64_t size() const { return static_cast<int64_t>(value.size()); }
};

// The points of n values of x. `weights` may be null; values of weight 0 are left out, unless all weights
// are 0, which counts as no weights. -0 is 0. 16-bit values are counted, float32 sorted by radix.
// skip_zero: leave out the value 0.
Points distinct(const void* x, Dtype dtype, const float* weights, int64_t n, bool skip_zero, const Parallel& parallel);

// sum h, sum h v, sum h v^2 of the points before each of the size + 1 places between them; v is the
// value less `center`, the middle point. The sums run outward from the middle, so that one far value
// cannot drown the others: places between it and the middle never hold it.
struct Prefix {
  Prefix(const Points& points, const Parallel& parallel);

  // Squared error of the points from place i up to place j about their mean.
  double cost(int64_t i, int64_t j) const;
  int64_t size() const { return static_cast<int64_t>(w.size()) - 1; }
  // Of all points.
  double weight() const { return w.back() - w.front(); }
  double squares() const { return s2.back() - s2.front(); }

  double center;
  LargeVector<double> w, s1, s2;
};

// Where Lloyd's algorithm starts.
enum class Start {
  plus_plus,  // k-means++: each level drawn with probability proportional to the squared distance to the nearest so far
  linear,     // evenly spaced from the smallest to the largest value; Deep Compression's choice
  quantile,   // the values at (c + 1/2) / k of the total weight
  random,     // k different points
  given,      // the levels that the caller filled in
};

struct LloydOptions {
  Start start;
  uint64_t seed;
  int64_t iterations;  // at most
};

// Batches of values drawn at random with replacement.
struct BatchOptions {
  int64_t size;
  int64_t count;
};

// The optimum: no k levels have a smaller error (up to the rounding of fp64 sums and of levels to fp32).
void kmeans_exact(const Points& points, int64_t k, float* levels, const Parallel& parallel);

// Lloyd's algorithm: levels to means of what is nearest to them, until nothing changes. A local optimum.
// A level without points stays where it is.
void kmeans_lloyd(const Points& points, int64_t k, LloydOptions options, float* levels);

// Lloyd on the first batch, then one step per batch with the rate of each level falling as one over the weight it has
// seen (Sculley 2010). Reads size * count values, whatever n is.
void kmeans_minibatch(const void* x, Dtype dtype, const float* weights, int64_t n, int64_t k, LloydOptions options,
                      BatchOptions batches, bool skip_zero, float* levels);

// sums[c] += the sum of grad over the values with code c: the gradient of a level whose copies they are.
// grad: n values of `dtype`; sums: fp64 [size]. A code that is not below size is left out.
void cluster_sums(const void* grad, Dtype dtype, const uint8_t* codes, int64_t n, int64_t size, double* sums);

// counts[c] += the number of values with code c; n below 2^32.
void cluster_sizes(const uint8_t* codes, int64_t n, int64_t size, int64_t* counts);

}  // namespace phiquant
