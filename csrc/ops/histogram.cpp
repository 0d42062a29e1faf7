// The ops of range estimation: histograms, thresholds from them, exact percentiles.
#include "core/histogram.h"

#include <bit>
#include <cmath>
#include <mutex>
#include <tuple>
#include <vector>

#include "core/histogram_search.h"
#include "core/percentile.h"
#include "ops/blocks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  // counts: int64 [bins]
  m.def("histogram(Tensor x, int bins, float lo, float hi) -> Tensor");
  // counts int64 [blocks, 2 bins]; exponent int64, lo, hi float32 [blocks]
  m.def("dyadic_histogram(Tensor x, int block, int bins) -> (Tensor, Tensor, Tensor, Tensor)");
  // counts float64 [blocks, bins], width float32 [blocks] -> int64 [blocks, 2]: first bin, end
  m.def("histogram_mse(Tensor counts, Tensor width, int levels) -> Tensor");
  // counts float64 [blocks, bins] -> float64 [blocks, bins + 1]: the divergence of cutting after each bin
  m.def("kl_divergence(Tensor counts, int levels, bool notebook) -> Tensor");
  // float32 [blocks]
  m.def("percentile(Tensor x, int block, float q, bool magnitude) -> Tensor");
}

namespace phiquant {
namespace {

constexpr int64_t kMostAtOnce = int64_t{1} << 30;  // the tables count in 32 bits

// Calls f(values, n) for pieces of x that cover n values, on several threads; each thread gets few and long ones.
template <class F>
void for_long_pieces(const void* x, Dtype dtype, int64_t n, const F& f) {
  // A table costs as much to clear and to add as about 16 thousand values cost to count.
  torch::stable::parallel_for(0, n, 4 * kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kMostAtOnce) f(shift(x, i, dtype), std::min(kMostAtOnce, end - i));
  });
}

Tensor histogram(const Tensor& x, int64_t bins, double lo, double hi) {
  const Dtype dtype = dtype_of(x, "x");
  check_contiguous(x, "x");
  check(1 <= bins && bins <= kMaxBins,
        "bins must be 1 to " + std::to_string(kMaxBins) + ", not " + std::to_string(bins));
  check(lo <= hi && hi - lo < std::numeric_limits<double>::infinity(),
        "lo and hi must be finite and in order, got " + std::to_string(lo) + " and " + std::to_string(hi));
  if (lo == hi) {  // as torch.histc, and more where one is too little for float32
    const double room = std::max(1.0, 1e-6 * std::abs(lo));
    lo -= room;
    hi += room;
  }
  const LinearBins linear{static_cast<float>(lo), static_cast<float>(hi), bins};
  Tensor counts = torch::stable::new_zeros(x, {bins}, ScalarType::Long);
  auto* out = static_cast<int64_t*>(counts.mutable_data_ptr());
  std::mutex adding;
  for_long_pieces(x.const_data_ptr(), dtype, x.numel(), [&](const void* values, int64_t n) {
    std::vector<int32_t> tables(static_cast<size_t>(kTables * table_length(bins)));
    histogram_kernels().linear(values, dtype, n, linear, tables.data());
    const std::lock_guard lock(adding);
    add_tables(tables.data(), bins, out);
  });
  return counts;
}

// One block's dyadic histogram, into which parts of the block are merged as they are ready.
struct Sink {
  int64_t* counts;
  int64_t* exponent;
  float* lo;
  float* hi;

  void merge(const DyadicBins& part, std::vector<int64_t>& buffer) const {
    const int64_t bins = part.bins;
    buffer.assign(static_cast<size_t>(2 * bins), 0);
    add_tables(part.tables, 2 * bins, buffer.data());
    if (part.exponent > *exponent) {
      coarsen(counts, bins, static_cast<int>(part.exponent - *exponent));
      *exponent = part.exponent;
    } else if (part.exponent < *exponent) {
      coarsen(buffer.data(), bins, static_cast<int>(*exponent - part.exponent));
    }
    for (int64_t i = 0; i < 2 * bins; ++i) counts[i] += buffer[static_cast<size_t>(i)];
    *lo = std::min(*lo, part.lo);
    *hi = std::max(*hi, part.hi);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> dyadic_histogram(const Tensor& x, int64_t block, int64_t bins) {
  const Layout l = layout_of(x, block);
  check(4 <= bins && 2 * bins <= kMaxBins && std::has_single_bit(static_cast<uint64_t>(bins)),
        "bins must be a power of two from 4 to " + std::to_string(kMaxBins / 2) + ", not " + std::to_string(bins));
  Tensor counts = torch::stable::new_zeros(x, {l.blocks, 2 * bins}, ScalarType::Long);
  Tensor exponent = torch::stable::new_empty(x, {l.blocks}, ScalarType::Long);
  Tensor lo = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  Tensor hi = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  const Sink first{static_cast<int64_t*>(counts.mutable_data_ptr()), static_cast<int64_t*>(exponent.mutable_data_ptr()),
                   static_cast<float*>(lo.mutable_data_ptr()), static_cast<float*>(hi.mutable_data_ptr())};
  auto sink = [&](int64_t b) {
    return Sink{first.counts + b * 2 * bins, first.exponent + b, first.lo + b, first.hi + b};
  };
  for (int64_t b = 0; b < l.blocks; ++b) {
    *sink(b).exponent = kMinExponent;
    *sink(b).lo = std::numeric_limits<float>::infinity();
    *sink(b).hi = -std::numeric_limits<float>::infinity();
  }
  const void* in = x.const_data_ptr();
  const auto tables = static_cast<size_t>(kTables * table_length(2 * bins));
  std::mutex merging;
  auto fill = [&](const void* values, int64_t n, int64_t b, bool shared) {
    std::vector<int32_t> zeros(tables);
    std::vector<int64_t> buffer;
    DyadicBins part{zeros.data(), bins};
    histogram_kernels().dyadic(values, l.dtype, n, part);
    std::unique_lock lock(merging, std::defer_lock);
    if (shared) lock.lock();
    sink(b).merge(part, buffer);
  };
  if (l.blocks == 1) {
    for_long_pieces(in, l.dtype, l.block, [&](const void* values, int64_t n) { fill(values, n, 0, true); });
  } else {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, l.block + 4 * bins));
    torch::stable::parallel_for(0, l.blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t i = 0; i < l.block; i += kMostAtOnce) {
          fill(shift(in, b * l.block + i, l.dtype), std::min(kMostAtOnce, l.block - i), b, false);
        }
      }
    });
  }
  return {counts, exponent, lo, hi};
}

// [blocks, bins] of a tensor of counts.
std::pair<int64_t, int64_t> shape_of_counts(const Tensor& counts) {
  check(counts.scalar_type() == ScalarType::Double && counts.dim() == 2, "counts must be float64 [blocks, bins]");
  check_contiguous(counts, "counts");
  return {counts.size(0), counts.size(1)};
}

void check_levels(int64_t levels) {
  check(1 <= levels && levels <= 65536, "levels must be 1 to 65536, not " + std::to_string(levels));
}

Tensor mse_ranges(const Tensor& counts, const Tensor& width, int64_t levels) {
  const auto [blocks, bins] = shape_of_counts(counts);
  check_float32(width, "width");
  check(width.numel() == blocks, "width must have a value for each block");
  check_levels(levels);
  Tensor ranges = torch::stable::new_empty(counts, {blocks, 2}, ScalarType::Long);
  const auto* in = static_cast<const double*>(counts.const_data_ptr());
  const auto* widths = static_cast<const float*>(width.const_data_ptr());
  auto* out = static_cast<int64_t*>(ranges.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, 1, [&, bins = bins](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(bins));
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < bins; ++i) row[static_cast<size_t>(i)] = static_cast<float>(in[b * bins + i]);
      const BinRange range = histogram_mse(row.data(), bins, widths[b], levels);
      out[2 * b] = range.first;
      out[2 * b + 1] = range.end;
    }
  });
  return ranges;
}

Tensor kl_divergence(const Tensor& counts, int64_t levels, bool notebook) {
  const auto [blocks, bins] = shape_of_counts(counts);
  check_levels(levels);
  Tensor divergences = torch::stable::new_empty(counts, {blocks, bins + 1}, ScalarType::Double);
  const auto* in = static_cast<const double*>(counts.const_data_ptr());
  auto* out = static_cast<double*>(divergences.mutable_data_ptr());
  for (int64_t b = 0; b < blocks; ++b) {
    const KlSearch search(in + b * bins, bins, levels, notebook ? KlForm::notebook : KlForm::tensorrt);
    double* row = out + b * (bins + 1);
    torch::stable::parallel_for(0, bins + 1, std::max<int64_t>(1, kGrain / 8 / levels),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) row[i] = search.divergence(i);
                                });
  }
  return divergences;
}

Tensor percentiles(const Tensor& x, int64_t block, double q, bool magnitude) {
  const Layout l = layout_of(x, block);
  check(0.0 <= q && q <= 1.0, "q must be between 0 and 1, not " + std::to_string(q));
  Tensor values = torch::stable::new_empty(x, {l.blocks}, ScalarType::Float);
  const void* in = x.const_data_ptr();
  auto* out = static_cast<float*>(values.mutable_data_ptr());
  torch::stable::parallel_for(0, l.blocks, std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(1, l.block)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b) {
                                  out[b] = percentile(shift(in, b * l.block, l.dtype), l.dtype, l.block, q, magnitude);
                                }
                              });
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) {
  m.impl("histogram", TORCH_BOX(&histogram));
  m.impl("dyadic_histogram", TORCH_BOX(&dyadic_histogram));
  m.impl("histogram_mse", TORCH_BOX(&mse_ranges));
  m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
  m.impl("percentile", TORCH_BOX(&percentiles));
}

}  // namespace phiquant
