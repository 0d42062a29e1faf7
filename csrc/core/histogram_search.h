// Ranges from histograms: where to clip so that what is lost, by squared error or by KL divergence, is least.
#pragma once

#include <cstdint>
#include <vector>

namespace phiquant {

// A run of bins: first <= i < end.
struct BinRange {
  int64_t first;
  int64_t end;
};

// The range of least squared error, by the greedy search of torch.ao's HistogramObserver (its steps, and its float32
// arithmetic but for one sum, which is in float64 here): values are taken as spread evenly over their bin and rounded
// to the middle of one of `levels` equal steps; from both ends the search moves inwards by quantiles of 1e-5, and it
// stops at the first move that does not lower the error, so it finds a local minimum.
// Starts at the outermost bins that are not empty; {0, bins} if all are.
BinRange histogram_mse(const float* counts, int64_t bins, float bin_width, int64_t levels);

enum class KlForm { tensorrt, notebook };

// KL(P || Q) for a histogram of |x| cut after i bins and merged to `levels` levels.
//
// tensorrt: P = the first i bins with everything beyond added to the last of them. Q = the same bins without that
//   tail; level l covers bins i l / levels .. i (l + 1) / levels (rounded down), and its sum is spread evenly over
//   its bins in which P is not zero. Both are normalised. Candidates: levels <= i <= the last bin that is not empty.
// notebook: what the course computes. Bin 0 is dropped, so i counts from bin 1; a level covers i / levels bins
//   rounded down and the last level takes all that is left over, but for the last bin of Q, which stays empty; bins
//   of P and Q that are empty get 1e-4 counts, taken evenly from those that are not. Candidates: levels <= i, and i
//   before the last bin that is not empty.
//
// Each level costs O(1) by prefix sums; a logarithm per level and candidate is all that is left.
class KlSearch {
 public:
  // counts: [bins], not negative. 1 <= levels.
  KlSearch(const double* counts, int64_t bins, int64_t levels, KlForm form);

  // Infinity if i is no candidate, or if Q is zero where P is not.
  double divergence(int64_t i) const;

 private:
  double tensorrt(int64_t i) const;
  double notebook(int64_t i) const;
  // Sum over the first i bins, the last counted as `last`, of p log p, where p is less by `taken` in bins not empty.
  double entropy(int64_t i, double last, double taken) const;
  double nonzero(int64_t begin, int64_t end, int64_t i, bool last) const;

  KlForm form_;
  int64_t levels_;
  int64_t bins_;               // those used: without bin 0 (notebook), without empty ones at the end
  std::vector<double> count_;  // [bins_]
  // Prefix sums over the bins that are not empty, [bins_ + 1]: counts, their number, and of p log p, log p, p^-1 ..
  // p^-4.
  std::vector<double> sum_, nonzero_, p_log_p_, log_p_;
  std::vector<double> power_[4];
};

}  // namespace phiquant
