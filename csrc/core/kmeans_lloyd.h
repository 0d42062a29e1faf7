// What the ways to choose levels share: from cuts to levels and back, and Lloyd's iteration between them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/kmeans.h"

namespace phiquant {

// Mean of each run between neighbouring cuts. cuts: k + 1 places, ascending, 0 and size at the ends. Empty runs
// are left out.
std::vector<double> means(const Points& points, const Prefix& prefix, const std::vector<int64_t>& cuts);

// Lloyd's algorithm on ascending levels, in place, until the cuts stay or `iterations` are done.
// Returns the error of the last cuts about the means of their runs.
double lloyd(const Points& points, const Prefix& prefix, std::vector<double>& levels, int64_t iterations);

// The cuts of ascending levels: a value at the middle of two levels belongs to the upper one.
std::vector<int64_t> cuts_of(const Points& points, const std::vector<double>& levels);

// Ascending levels as float32, the last one repeated up to k. No points at all: zeros.
template <class Levels>
void store_levels(const Levels& from, int64_t k, float* levels) {
  for (int64_t c = 0; c < k; ++c) {
    const auto i = std::min<size_t>(static_cast<size_t>(c), from.size() - 1);
    levels[c] = from.empty() ? 0.0f : static_cast<float>(from[i]);
  }
}

}  // namespace phiquant
