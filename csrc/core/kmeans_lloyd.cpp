// Lloyd's algorithm on sorted points: a step is k binary searches, whatever the number of values.
#include "core/kmeans_lloyd.h"

#include <algorithm>
#include <cmath>

#include "core/half.h"
#include "core/kmeans_random.h"

namespace phiquant {
namespace {

// Mean of the points from place i up to place j. Between them even where the sums have lost their small weights.
double mean(const Points& points, const Prefix& p, int64_t i, int64_t j) {
  const double w = p.w[j] - p.w[i];
  const double m = w > 0.0 ? p.center + (p.s1[j] - p.s1[i]) / w : points.value[i];
  return std::clamp<double>(m, points.value[i], points.value[j - 1]);
}

// Squared error of the points from place i up to place j about `level`.
double error_about(const Prefix& p, int64_t i, int64_t j, double level) {
  const double c = level - p.center;
  return std::max(0.0, p.s2[j] - p.s2[i] - 2 * c * (p.s1[j] - p.s1[i]) + c * c * (p.w[j] - p.w[i]));
}

// The first place j in (lo, hi] for which the sum of f over the points from lo up to j exceeds `share`.
template <class Sum>
int64_t find_share(int64_t lo, int64_t hi, double share, Sum sum) {
  int64_t below = lo;
  while (hi - below > 1) {
    const int64_t middle = below + (hi - below) / 2;
    (sum(middle) > share ? hi : below) = middle;
  }
  return hi;
}

// Each draw takes k steps and a binary search: the distances of a run's points sum up by prefix sums.
std::vector<double> plus_plus(const Points& points, const Prefix& prefix, int64_t k, Random& random) {
  const int64_t n = points.size();
  const int64_t first =
      find_share(0, n, random.uniform() * prefix.weight(), [&](int64_t j) { return prefix.w[j] - prefix.w[0]; });
  std::vector<double> levels = {points.value[first - 1]};
  std::vector<double> errors;
  while (static_cast<int64_t>(levels.size()) < k) {
    const std::vector<int64_t> cuts = cuts_of(points, levels);
    errors.resize(levels.size());
    double total = 0.0;
    for (size_t c = 0; c < levels.size(); ++c)
      total += errors[c] = error_about(prefix, cuts[c], cuts[c + 1], levels[c]);
    if (!(total > 0.0)) break;  // every point is a level
    double share = random.uniform() * total;
    size_t c = 0;
    for (; c + 1 < levels.size() && share >= errors[c]; ++c) share -= errors[c];
    while (c > 0 && cuts[c] == cuts[c + 1]) --c;
    const int64_t j = find_share(cuts[c], cuts[c + 1], share,
                                 [&](int64_t place) { return error_about(prefix, cuts[c], place, levels[c]); });
    const double level = points.value[j - 1];
    const auto place = std::lower_bound(levels.begin(), levels.end(), level);
    if (place != levels.end() && *place == level) break;  // what is left is rounding
    levels.insert(place, level);
  }
  return levels;
}

std::vector<double> random_points(const Points& points, int64_t k, Random& random) {
  // Floyd's sample of k different indices.
  std::vector<int64_t> chosen;
  for (int64_t i = points.size() - k; i < points.size(); ++i) {
    const int64_t drawn = random.below(i + 1);
    const auto place = std::lower_bound(chosen.begin(), chosen.end(), drawn);
    if (place != chosen.end() && *place == drawn) {
      chosen.push_back(i);  // the largest so far
    } else {
      chosen.insert(place, drawn);
    }
  }
  std::vector<double> levels;
  for (const int64_t i : chosen) levels.push_back(points.value[i]);
  return levels;
}

std::vector<double> start_levels(const Points& points, const Prefix& prefix, int64_t k, LloydOptions options,
                                 const float* given) {
  const int64_t n = points.size();
  Random random(options.seed);
  std::vector<double> levels;
  switch (options.start) {
    case Start::plus_plus:
      return plus_plus(points, prefix, k, random);
    case Start::random:
      return random_points(points, k, random);
    case Start::linear:
      for (int64_t c = 0; c < k; ++c) {
        const double t = k > 1 ? static_cast<double>(c) / static_cast<double>(k - 1) : 0.5;
        levels.push_back(points.value.front() * (1 - t) + points.value.back() * t);
      }
      return levels;
    case Start::quantile:
      for (int64_t c = 0; c < k; ++c) {
        const double share = (static_cast<double>(c) + 0.5) / static_cast<double>(k) * prefix.weight();
        levels.push_back(
            points.value[find_share(0, n, share, [&](int64_t j) { return prefix.w[j] - prefix.w[0]; }) - 1]);
      }
      return levels;
    case Start::given:
      levels.assign(given, given + k);
      std::sort(levels.begin(), levels.end());
      return levels;
  }
  return levels;
}

}  // namespace

std::vector<double> means(const Points& points, const Prefix& prefix, const std::vector<int64_t>& cuts) {
  std::vector<double> levels;
  for (size_t c = 0; c + 1 < cuts.size(); ++c) {
    if (cuts[c] < cuts[c + 1]) levels.push_back(mean(points, prefix, cuts[c], cuts[c + 1]));
  }
  return levels;
}

std::vector<int64_t> cuts_of(const Points& points, const std::vector<double>& levels) {
  std::vector<int64_t> cuts = {0};
  auto from = points.value.begin();
  for (size_t c = 0; c + 1 < levels.size(); ++c) {
    const double middle = 0.5 * (levels[c] + levels[c + 1]);
    from = std::lower_bound(from, points.value.end(), middle);
    cuts.push_back(from - points.value.begin());
  }
  cuts.push_back(points.size());
  return cuts;
}

double lloyd(const Points& points, const Prefix& prefix, std::vector<double>& levels, int64_t iterations) {
  std::vector<int64_t> cuts = cuts_of(points, levels);
  for (int64_t i = 0; i < iterations; ++i) {
    for (size_t c = 0; c < levels.size(); ++c) {
      if (cuts[c] < cuts[c + 1]) levels[c] = mean(points, prefix, cuts[c], cuts[c + 1]);
    }
    std::vector<int64_t> moved = cuts_of(points, levels);
    if (moved == cuts) break;
    cuts = std::move(moved);
  }
  double error = 0.0;
  for (size_t c = 0; c < levels.size(); ++c) error += prefix.cost(cuts[c], cuts[c + 1]);
  return error;
}

void kmeans_lloyd(const Points& points, int64_t k, LloydOptions options, float* levels) {
  if (points.size() <= k) return store_levels(points.value, k, levels);
  const Prefix prefix(points, serial);
  std::vector<double> found = start_levels(points, prefix, k, options, levels);
  lloyd(points, prefix, found, options.iterations);
  store_levels(found, k, levels);
}

void kmeans_minibatch(const void* x, Dtype dtype, const float* weights, int64_t n, int64_t k, LloydOptions options,
                      BatchOptions batches, bool skip_zero, float* levels) {
  Random random(options.seed);
  std::vector<float> values(static_cast<size_t>(batches.size));
  std::vector<float> value_weights(weights ? values.size() : 0);
  auto draw = [&] {
    for (size_t i = 0; i < values.size(); ++i) {
      const int64_t at = random.below(n);
      values[i] = dtype == Dtype::f32    ? static_cast<const float*>(x)[at]
                  : dtype == Dtype::bf16 ? to_float(static_cast<const bf16*>(x)[at])
                                         : to_float(static_cast<const f16*>(x)[at]);
      if (weights) value_weights[i] = weights[at];
    }
    return distinct(values.data(), Dtype::f32, weights ? value_weights.data() : nullptr, batches.size, skip_zero,
                    serial);
  };
  Points points = draw();
  kmeans_lloyd(points, k, options, levels);
  std::vector<double> seen(static_cast<size_t>(k));
  std::vector<double> found(levels, levels + k);
  for (int64_t batch = 0; batch < batches.count; ++batch) {
    const Prefix prefix(points, serial);
    const std::vector<int64_t> cuts = cuts_of(points, found);
    for (int64_t c = 0; c < k; ++c) {
      const double weight = prefix.w[cuts[c + 1]] - prefix.w[cuts[c]];
      if (!(weight > 0.0)) continue;
      seen[c] += weight;
      found[c] += (mean(points, prefix, cuts[c], cuts[c + 1]) - found[c]) * weight / seen[c];
    }
    std::sort(found.begin(), found.end());
    if (batch + 1 < batches.count) points = draw();
  }
  store_levels(found, k, levels);
}

}  // namespace phiquant
