#include "core/histogram_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace phiquant {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// The error of rounding to `levels` steps that span bins first .. last. float32, as torch.ao computes it.
double squared_error(const float* counts, int64_t bins, float bin_width, int64_t first, int64_t last, int64_t levels) {
  const double step = static_cast<double>(bin_width) * static_cast<double>(last - first + 1) / levels;
  if (step == 0.0) return 0.0;
  const float d = static_cast<float>(step);
  const float half = static_cast<float>(step / 2);
  const float top = static_cast<float>(levels - 1);
  const float whole = (half * half * half + half * half * half) / 3.0f;
  auto level_of = [&](float place) {  // the quotient of two floats, rounded down: exact in double
    const auto level = static_cast<float>(std::floor(static_cast<double>(place) / static_cast<double>(d)));
    return std::clamp(level, 0.0f, top);
  };
  double total = 0.0;
  for (int64_t i = 0; i < bins; ++i) {
    if (counts[i] == 0.0f) continue;
    const float density = counts[i] / bin_width;
    const float begin = static_cast<float>(i - first) * bin_width;
    const float end = begin + bin_width;
    const float from = level_of(begin);
    const float to = level_of(end);
    const float before = begin - (from + 0.5f) * d;  // distances to the levels at both ends of the bin
    const float after = end - (to * d + half);
    float error = density * ((half * half * half - before * before * before) / 3.0f);
    error += (to - from - 1.0f) * (density * whole);
    error += density * ((after * after * after + half * half * half) / 3.0f);
    total += error;
  }
  return total;
}

}  // namespace

BinRange histogram_mse(const float* counts, int64_t bins, float bin_width, int64_t levels) {
  std::vector<float> cumulative(static_cast<size_t>(bins));
  double running = 0.0;
  int64_t first = bins;
  int64_t last = -1;
  for (int64_t i = 0; i < bins; ++i) {
    running += counts[i];
    cumulative[static_cast<size_t>(i)] = static_cast<float>(running);
    if (counts[i] == 0.0f) continue;
    first = std::min(first, i);
    last = i;
  }
  if (last < 0) return {0, bins};

  constexpr double kStep = 1e-5;
  const double total = static_cast<float>(running);
  double alpha = 0.0;
  double beta = 1.0;
  double least = kInf;
  while (alpha < beta) {
    const double next_alpha = alpha + kStep;
    const double next_beta = beta - kStep;
    const auto low = static_cast<float>(next_alpha * total);
    const auto high = static_cast<float>(next_beta * total);
    int64_t left = first;
    int64_t right = last;
    while (left < last && cumulative[static_cast<size_t>(left)] < low) ++left;
    while (right > first && cumulative[static_cast<size_t>(right)] > high) --right;
    const bool move_left = left - first > last - right;
    if (move_left) {
      alpha = next_alpha;
      right = last;
    } else {
      beta = next_beta;
      left = first;
    }
    if (left == first && right == last) continue;
    const double error = squared_error(counts, bins, bin_width, left, right, levels);
    if (error > least) break;
    least = error;
    first = left;
    last = right;
  }
  return {first, last + 1};
}

KlSearch::KlSearch(const double* counts, int64_t bins, int64_t levels, KlForm form)
    : form_(form), levels_(levels), bins_(bins), count_(counts, counts + bins) {
  if (form == KlForm::notebook && bins > 0) {
    count_.erase(count_.begin());
    --bins_;
  }
  while (bins_ > 0 && count_[static_cast<size_t>(bins_ - 1)] == 0.0) --bins_;
  const auto length = static_cast<size_t>(bins_ + 1);
  for (std::vector<double>* prefix :
       {&sum_, &nonzero_, &p_log_p_, &log_p_, &power_[0], &power_[1], &power_[2], &power_[3]}) {
    prefix->assign(length, 0.0);
  }
  for (size_t i = 0; i + 1 < length; ++i) {
    const double p = count_[i];
    const bool empty = p == 0.0;
    const double log_p = empty ? 0.0 : std::log(p);
    sum_[i + 1] = sum_[i] + p;
    nonzero_[i + 1] = nonzero_[i] + (empty ? 0.0 : 1.0);
    p_log_p_[i + 1] = p_log_p_[i] + p * log_p;
    log_p_[i + 1] = log_p_[i] + log_p;
    double power = empty ? 0.0 : 1.0;
    for (std::vector<double>& prefix : power_) {
      power = empty ? 0.0 : power / p;
      prefix[i + 1] = prefix[i] + power;
    }
  }
}

double KlSearch::divergence(int64_t i) const { return form_ == KlForm::tensorrt ? tensorrt(i) : notebook(i); }

// Number of bins in [begin, end) that are not empty in P, whose last bin is i - 1 and not empty if `last` says so.
double KlSearch::nonzero(int64_t begin, int64_t end, int64_t i, bool last) const {
  const auto at = [&](int64_t k) { return nonzero_[static_cast<size_t>(k)]; };
  if (end < i) return at(end) - at(begin);
  return at(i - 1) - at(std::min(begin, i - 1)) + (last && begin < i ? 1.0 : 0.0);
}

double KlSearch::entropy(int64_t i, double last, double taken) const {
  const auto k = static_cast<size_t>(i - 1);
  const double at_last = last > 0.0 ? (last - taken) * std::log(last - taken) : 0.0;
  if (taken <= 1e-3) {
    // (p - e) log(p - e) as a series in e / p, p >= 1: what is left out is below e^6 / 30.
    const double e = taken;
    double sum = p_log_p_[k] - e * log_p_[k] - e * nonzero_[k];
    double term = e;
    for (int j = 0; j < 4; ++j) {
      term *= e;
      sum += term / ((j + 1) * (j + 2)) * power_[j][k];
    }
    return sum + at_last;
  }
  double sum = 0.0;  // ten empty bins for one that is not: few terms
  for (size_t j = 0; j < k; ++j) {
    if (count_[j] > 0.0) sum += (count_[j] - taken) * std::log(count_[j] - taken);
  }
  return sum + at_last;
}

double KlSearch::tensorrt(int64_t i) const {
  if (i < levels_ || i > bins_ || i < 1) return kInf;
  const auto at = [&](int64_t k) { return sum_[static_cast<size_t>(k)]; };
  const double kept = at(i);
  const double total = at(bins_);
  if (kept == 0.0) return kInf;
  const double last = count_[static_cast<size_t>(i - 1)] + (total - kept);
  double cross = 0.0;  // sum of p log q
  for (int64_t l = 0; l < levels_; ++l) {
    const int64_t begin = i * l / levels_;
    const int64_t end = i * (l + 1) / levels_;
    const double q = at(end) - at(begin);
    const double p = q + (end == i ? total - kept : 0.0);
    if (p == 0.0) continue;
    if (q == 0.0) return kInf;
    cross += p * std::log(q / nonzero(begin, end, i, last > 0.0));
  }
  return (entropy(i, last, 0.0) - cross) / total - std::log(total) + std::log(kept);
}

double KlSearch::notebook(int64_t i) const {
  constexpr double kSmall = 1e-4;
  if (i < levels_ || i >= bins_ || i < 1) return kInf;
  const auto at = [&](int64_t k) { return sum_[static_cast<size_t>(k)]; };
  const double total = at(bins_);
  if (total == 0.0) return kInf;
  const double last = count_[static_cast<size_t>(i - 1)] + (total - at(i));
  const double full = nonzero(0, i, i, last > 0.0);
  const double empty = static_cast<double>(i) - full;
  const double taken = kSmall * empty / full;
  if (taken >= 1.0) return kInf;

  const int64_t merged = i / levels_;
  struct Level {
    double q, bins, p_sum, p_full;
  };
  // Calls f for each level with a value, an amount for each of its bins; the last bin belongs to none.
  auto for_levels = [&](auto f) {
    for (int64_t l = 0; l < levels_; ++l) {
      const int64_t begin = l * merged;
      const bool final = l == levels_ - 1;
      const int64_t end = final ? i - 1 : begin + merged;
      const double filled = end > begin ? nonzero(begin, end, i, false) : 0.0;
      const double amount = filled > 0.0 ? (at(final ? i : end) - at(begin)) / filled : 0.0;
      const double p_sum = end > begin ? at(end) - at(begin) : 0.0;
      f(Level{amount, static_cast<double>(std::max<int64_t>(0, end - begin)), p_sum, filled});
    }
  };
  double q_full = 0.0;
  double q_sum = 0.0;
  for_levels([&](const Level& l) {
    if (l.q == 0.0) return;
    q_full += l.bins;
    q_sum += l.q * l.bins;
  });
  if (q_full == 0.0) return kInf;
  const double q_empty = static_cast<double>(i) - q_full;
  const double q_taken = kSmall * q_empty / q_full;
  const double log_small = std::log(kSmall);
  auto smoothed = [&](double sum, double number, double of) { return sum - taken * of + kSmall * (number - of); };
  double cross = log_small * smoothed(last, 1.0, last > 0.0 ? 1.0 : 0.0);
  bool negative = q_taken >= 1.0;
  for_levels([&](const Level& l) {
    negative = negative || (l.q != 0.0 && l.q <= q_taken);
    cross += smoothed(l.p_sum, l.bins, l.p_full) * (l.q == 0.0 ? log_small : std::log(l.q - q_taken));
  });
  if (negative) return kInf;
  const double own = entropy(i, last, taken) + empty * kSmall * log_small;
  return (own - cross) / total - std::log(total) + std::log(q_sum);
}

}  // namespace phiquant
