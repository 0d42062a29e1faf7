// The optimal k levels by dynamic programming over the places where one run of points ends and the next begins.
//
// D[c][b], the least error of the points before place b in c runs, is  min_a D[c-1][a] + cost(a, b).  The cost obeys
// the quadrangle inequality, so the best a does not decrease with b, and divide and conquer finds a layer of n places
// in O(n log n) (Wu 1991; Gronlund et al. 2017). All k layers over a million places would still take seconds. So the
// places are searched from coarse to fine, with a proof at each step:
//
//   A cell is `step` neighbouring places. If cut c lies in cell a and cut c + 1 in cell b, the run between
//   them contains all points from the last place of a to the first of b, so it costs at least what those do. Dynamic
//   programming with these costs over cells gives, forward and backward, a lower bound on the error of every solution
//   whose cut c lies in a given cell. Where the bound is above the error of a known solution, the cut is not there.
//
// What remains is a window of cells for each cut, searched again with smaller steps; with step 1 the bound is
// the error itself, and its minimum the optimum.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/kmeans.h"
#include "core/kmeans_lloyd.h"

namespace phiquant {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Each refinement divides the step by this.
constexpr int64_t kRefine = 8;

// Cells lo..hi, both included, in which a cut may lie.
struct Window {
  int64_t lo;
  int64_t hi;
  int64_t size() const { return hi - lo + 1; }
};

// Sums before one place of each cell.
struct Edge {
  std::vector<double> w, s1, s2;

  void resize(int64_t n) { w.resize(n), s1.resize(n), s2.resize(n); }
};

// The cells of one step. Place p is in cell p / step.
struct Cells {
  Cells(const Prefix& prefix, int64_t step) {
    const int64_t count = prefix.size() / step + 1;
    first.resize(count);
    last.resize(count);
    for (int64_t cell = 0; cell < count; ++cell) {
      copy(prefix, cell * step, first, cell);
      copy(prefix, std::min(cell * step + step - 1, prefix.size()), last, cell);
    }
  }

  int64_t count() const { return static_cast<int64_t>(first.w.size()); }

  // The same cells seen from the other end.
  Cells reversed() const {
    Cells r = *this;
    auto turn = [](Edge& e) {
      for (auto* v : {&e.w, &e.s1, &e.s2}) {
        std::reverse(v->begin(), v->end());
        for (double& x : *v) x = -x;
      }
    };
    std::swap(r.first, r.last);
    turn(r.first);
    turn(r.last);
    return r;
  }

  Edge first;
  Edge last;

 private:
  static void copy(const Prefix& p, int64_t place, Edge& e, int64_t cell) {
    e.w[cell] = p.w[place];
    e.s1[cell] = p.s1[place];
    e.s2[cell] = p.s2[place];
  }
};

// bound[b - window.lo]: least error of the points before cell b with this cut in b; from: the cell of the cut before.
struct Layer {
  Window window;
  std::vector<double> bound;
  std::vector<int32_t> from;
};

// Finds one layer from the one before.
class Step {
 public:
  Step(const Cells& cells, const Layer& before, Layer& layer) : cells_(cells), before_(before), layer_(layer) {
    layer.bound.resize(static_cast<size_t>(layer.window.size()));
    layer.from.resize(layer.bound.size());
  }

  void run() { solve(layer_.window, before_.window); }

 private:
  // Bounds of the cells in `rows`, whose best predecessors lie in `range`.
  void solve(Window rows, Window range) {
    while (rows.lo <= rows.hi) {
      const int64_t middle = rows.lo + (rows.hi - rows.lo) / 2;
      const int64_t best = find(middle, range);
      solve({rows.lo, middle - 1}, {range.lo, best});
      rows.lo = middle + 1;
      range.lo = best;
    }
  }

  int64_t find(int64_t b, Window range) {
    const double w = cells_.first.w[b];
    const double s1 = cells_.first.s1[b];
    const double s2 = cells_.first.s2[b];
    const double* before = before_.bound.data() - before_.window.lo;
    double least = kInfinity;
    int64_t best = range.lo;
    for (int64_t a = range.lo; a <= std::min(range.hi, b - 1); ++a) {
      const double s = s1 - cells_.last.s1[a];
      const double cost = s2 - cells_.last.s2[a] - s * s / (w - cells_.last.w[a]);
      // Not below 0, nor NaN: where weights differ by more than fp64 holds, the rest of a difference is noise.
      const double bound = before[a] + (cost > 0.0 ? cost : 0.0);
      if (bound < least) {
        least = bound;
        best = a;
      }
    }
    if (range.hi >= b && before[b] < least) {  // both cuts in one cell: a run that costs nothing
      least = before[b];
      best = b;
    }
    layer_.bound[b - layer_.window.lo] = least;
    layer_.from[b - layer_.window.lo] = static_cast<int32_t>(best);
    return best;
  }

  const Cells& cells_;
  const Layer& before_;
  Layer& layer_;
};

// All layers 0..k; cut c lies in windows[c].
std::vector<Layer> all_layers(const Cells& cells, const std::vector<Window>& windows) {
  std::vector<Layer> layers(windows.size());
  layers[0] = {windows[0], {0.0}, {0}};
  for (size_t c = 1; c < windows.size(); ++c) {
    layers[c].window = windows[c];
    Step(cells, layers[c - 1], layers[c]).run();
  }
  return layers;
}

// The cells of the cuts on the best path to the last layer.
std::vector<int64_t> best_path(const std::vector<Layer>& layers) {
  std::vector<int64_t> path(layers.size());
  int64_t cell = layers.back().window.hi;
  for (size_t c = layers.size(); c-- > 0;) {
    path[c] = cell;
    cell = layers[c].from[cell - layers[c].window.lo];
  }
  return path;
}

std::vector<Window> reversed(std::vector<Window> windows, int64_t last) {
  std::reverse(windows.begin(), windows.end());
  for (Window& w : windows) w = {last - w.hi, last - w.lo};
  return windows;
}

class Search {
 public:
  Search(const Points& points, const Prefix& prefix, int64_t k, const Parallel& parallel)
      : points_(points), prefix_(prefix), k_(k), parallel_(parallel) {
    places_.resize(static_cast<size_t>(k + 1), {0, prefix.size()});
    places_.front() = {0, 0};
    places_.back() = {prefix.size(), prefix.size()};
  }

  // The cuts of the optimum.
  std::vector<int64_t> run() {
    int64_t step = 1;
    while (prefix_.size() / step > std::max<int64_t>(2048, 16 * k_)) step *= kRefine;
    for (; step > 1; step /= kRefine) narrow(step);
    return best_path(all_layers(Cells(prefix_, 1), places_));
  }

 private:
  void narrow(int64_t step) {
    const Cells forward_cells(prefix_, step);
    const Cells backward_cells = forward_cells.reversed();
    const int64_t last = forward_cells.count() - 1;
    std::vector<Window> windows = places_;
    for (Window& w : windows) w = {w.lo / step, w.hi / step};
    std::vector<Layer> forward, backward;
    parallel_(2, [&](int64_t task) {
      if (task == 0) {
        forward = all_layers(forward_cells, windows);
      } else {
        backward = all_layers(backward_cells, reversed(windows, last));
      }
    });
    std::vector<int64_t> cuts = best_path(forward);
    for (int64_t& cut : cuts) cut *= step;
    cuts.back() = prefix_.size();
    std::vector<double> levels = means(points_, prefix_, cuts);
    known_ = std::min(known_, lloyd(points_, prefix_, levels, 100));
    // Room for the rounding of sums that both bounds and the known error contain.
    const double limit = known_ * (1 + 1e-9) + 1e-13 * (prefix_.s2.back() - prefix_.s2.front());
    for (int64_t c = 1; c < k_; ++c) {
      const Layer& f = forward[c];
      const Layer& b = backward[k_ - c];
      auto possible = [&](int64_t cell) {
        return f.bound[cell - f.window.lo] + b.bound[last - cell - b.window.lo] <= limit;
      };
      Window w = f.window;
      while (w.lo < w.hi && !possible(w.lo)) ++w.lo;
      while (w.hi > w.lo && !possible(w.hi)) --w.hi;
      places_[c] = {std::max({places_[c].lo, w.lo * step, places_[c - 1].lo}),
                    std::min(places_[c].hi, w.hi * step + step - 1)};
    }
    for (int64_t c = k_ - 1; c > 0; --c) places_[c].hi = std::min(places_[c].hi, places_[c + 1].hi);
  }

  const Points& points_;
  const Prefix& prefix_;
  int64_t k_;
  const Parallel& parallel_;
  std::vector<Window> places_;  // of each cut
  double known_ = kInfinity;
};

}  // namespace

void kmeans_exact(const Points& points, int64_t k, float* levels, const Parallel& parallel) {
  if (points.size() <= k) return store_levels(points.value, k, levels);
  const Prefix prefix(points);
  store_levels(means(points, prefix, Search(points, prefix, k, parallel).run()), k, levels);
}

}  // namespace phiquant
