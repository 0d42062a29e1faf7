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

// Places, or cells, lo..hi, both included, in which a cut may lie.
struct Window {
  int64_t lo;
  int64_t hi;
  int64_t size() const { return hi - lo + 1; }
};

// Sums before one place of each cell.
struct Edge {
  LargeVector<double> w, s1, s2;

  void resize(size_t n) { w.resize(n), s1.resize(n), s2.resize(n); }
  void set(int64_t cell, const Prefix& p, int64_t place) {
    w[cell] = p.w[place];
    s1[cell] = p.s1[place];
    s2[cell] = p.s2[place];
  }
};

// The cells of one step in which a cut may lie, in order, and the window of each cut in them. The windows
// of the cuts neither begin nor end before those of earlier cuts.
class Cells {
 public:
  Cells(const Prefix& prefix, int64_t step, const std::vector<Window>& places, const Parallel& parallel) : step_(step) {
    for (const Window& w : places) {
      const int64_t lo = w.lo / step;
      const int64_t hi = w.hi / step;
      for (int64_t cell = begin.empty() ? lo : std::max(lo, begin.back() / step + 1); cell <= hi; ++cell) {
        begin.push_back(cell * step);
      }
      const auto at = std::lower_bound(begin.begin(), begin.end(), lo * step) - begin.begin();
      windows.push_back({at, at + hi - lo});
    }
    first.resize(begin.size());
    last_.resize(step > 1 ? begin.size() : 0);
    parallel(kParts, [&](int64_t part) {
      for (int64_t cell = part * count() / kParts; cell < (part + 1) * count() / kParts; ++cell) {
        first.set(cell, prefix, begin[cell]);
        if (step > 1) last_.set(cell, prefix, std::min(begin[cell] + step - 1, prefix.size()));
      }
    });
  }

  int64_t count() const { return static_cast<int64_t>(begin.size()); }
  const Edge& last() const { return step_ > 1 ? last_ : first; }

  LargeVector<int64_t> begin;  // the first place of each
  Edge first;
  std::vector<Window> windows;

 private:
  static constexpr int64_t kParts = 4;
  int64_t step_;
  Edge last_;
};

// From which end cells and cuts are counted. From the back, cell 0 is the last one.
enum class End { front, back };

// bound[b - window.lo]: least error of the points between this end and cell b with this cut in b; from: the cell
// of the cut before.
struct Layer {
  Window window;
  LargeVector<double> bound;
  LargeVector<int32_t> from;
};

// Finds one layer from the one before.
template <End end>
class Step {
 public:
  Step(const Cells& cells, const Layer& before, Layer& layer)
      : near_(end == End::front ? cells.first : cells.last()),
        far_(end == End::front ? cells.last() : cells.first),
        count_(cells.count()),
        before_(before),
        layer_(layer) {
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

  int64_t place(int64_t cell) const { return end == End::front ? cell : count_ - 1 - cell; }

  int64_t find(int64_t b, Window range) {
    const double sign = end == End::front ? 1.0 : -1.0;
    const double w = near_.w[place(b)];
    const double s1 = near_.s1[place(b)];
    const double s2 = near_.s2[place(b)];
    const double* before = before_.bound.data() - before_.window.lo;
    double least = kInfinity;
    int64_t best = range.lo;
    for (int64_t a = range.lo; a <= std::min(range.hi, b - 1); ++a) {
      const int64_t p = place(a);
      const double s = s1 - far_.s1[p];
      const double cost = sign * (s2 - far_.s2[p] - s * s / (w - far_.w[p]));
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

  const Edge& near_;  // where the points between cells a and b end
  const Edge& far_;   // where they begin
  int64_t count_;
  const Layer& before_;
  Layer& layer_;
};

// Layers 0..count from one end.
template <End end>
std::vector<Layer> layers_of(const Cells& cells, int64_t count) {
  auto window = [&](int64_t c) -> Window {
    if (end == End::front) return cells.windows[c];
    const Window w = cells.windows[cells.windows.size() - 1 - c];
    return {cells.count() - 1 - w.hi, cells.count() - 1 - w.lo};
  };
  std::vector<Layer> layers(static_cast<size_t>(count + 1));
  layers[0] = {window(0), {0.0}, {0}};
  for (int64_t c = 1; c <= count; ++c) {
    layers[c].window = window(c);
    Step<end>(cells, layers[c - 1], layers[c]).run();
  }
  return layers;
}

// The cells of the cuts on the best path to `cell` of the last layer.
std::vector<int64_t> path_to(const std::vector<Layer>& layers, int64_t cell) {
  std::vector<int64_t> path(layers.size());
  for (size_t c = layers.size(); c-- > 0;) {
    path[c] = cell;
    cell = layers[c].from[cell - layers[c].window.lo];
  }
  return path;
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
    while (prefix_.size() / step > std::max<int64_t>(512, 16 * k_)) step *= kRefine;
    for (; step > 1; step /= kRefine) narrow(step);
    return finish();
  }

 private:
  // Both ends at once: layers 0..front_count from the front, 0..back_count from the back.
  void solve(const Cells& cells, int64_t front_count, int64_t back_count) {
    parallel_(2, [&](int64_t task) {
      if (task == 0) {
        front_ = layers_of<End::front>(cells, front_count);
      } else {
        back_ = layers_of<End::back>(cells, back_count);
      }
    });
  }

  // Least error of the solutions whose cut c lies in `cell`, or a bound of it.
  double bound(int64_t c, int64_t cell, int64_t count) const {
    const Layer& f = front_[c];
    const Layer& b = back_[k_ - c];
    return f.bound[cell - f.window.lo] + b.bound[count - 1 - cell - b.window.lo];
  }

  // Drops the cells at the ends of the windows in which no cut of the optimum lies.
  void narrow(int64_t step) {
    const Cells cells(prefix_, step, places_, parallel_);
    solve(cells, k_, k_);
    std::vector<int64_t> cuts = path_to(front_, cells.windows[k_].hi);
    for (int64_t& cut : cuts) cut = cells.begin[cut];
    cuts.back() = prefix_.size();
    std::vector<double> levels = means(points_, prefix_, cuts);
    known_ = std::min(known_, lloyd(points_, prefix_, levels, 100));
    // Room for the rounding of sums that both the bounds and the known error contain.
    const double limit = known_ * (1 + 1e-9) + 1e-13 * prefix_.squares();
    for (int64_t c = 1; c < k_; ++c) {
      Window w = cells.windows[c];
      while (w.lo < w.hi && bound(c, w.lo, cells.count()) > limit) ++w.lo;
      while (w.hi > w.lo && bound(c, w.hi, cells.count()) > limit) --w.hi;
      places_[c].lo = std::max({places_[c].lo, cells.begin[w.lo], places_[c - 1].lo});
      places_[c].hi = std::min(places_[c].hi, cells.begin[w.hi] + step - 1);
    }
    for (int64_t c = k_ - 1; c > 0; --c) places_[c].hi = std::min(places_[c].hi, places_[c + 1].hi);
  }

  // With step 1 bounds are errors: the halves of the cuts from both ends, and the best place to join them.
  std::vector<int64_t> finish() {
    const Cells cells(prefix_, 1, places_, parallel_);
    const int64_t half = k_ / 2;
    solve(cells, half, k_ - half);
    int64_t join = cells.windows[half].lo;
    for (int64_t cell = join; cell <= cells.windows[half].hi; ++cell) {
      if (bound(half, cell, cells.count()) < bound(half, join, cells.count())) join = cell;
    }
    std::vector<int64_t> cuts = path_to(front_, join);
    const std::vector<int64_t> rest = path_to(back_, cells.count() - 1 - join);
    for (size_t c = rest.size() - 1; c-- > 0;) cuts.push_back(cells.count() - 1 - rest[c]);
    for (int64_t& cut : cuts) cut = cells.begin[cut];
    return cuts;
  }

  const Points& points_;
  const Prefix& prefix_;
  int64_t k_;
  const Parallel& parallel_;
  std::vector<Window> places_;  // of each cut
  std::vector<Layer> front_;
  std::vector<Layer> back_;
  double known_ = kInfinity;
};

}  // namespace

void kmeans_exact(const Points& points, int64_t k, float* levels, const Parallel& parallel) {
  if (points.size() <= k) return store_levels(points.value, k, levels);
  const Prefix prefix(points, parallel);
  store_levels(means(points, prefix, Search(points, prefix, k, parallel).run()), k, levels);
}

}  // namespace phiquant
