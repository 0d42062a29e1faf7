// k-means of the values of each block, and the gradient of a codebook.
//
// x, grad: float32, bfloat16 or float16, contiguous, blocks of `block` values; codes: uint8 in their shape.
// weights: float32, a value for each of x, or none. start: 0 k-means++, 1 linear, 2 quantile, 3 random, 4 the
// levels in `init` [blocks, k] (core/kmeans.h). A block that holds a value that is not finite gets NaN levels.
#include "core/kmeans.h"

#include <atomic>
#include <limits>
#include <tuple>
#include <vector>

#include "core/kmeans_vectors.h"
#include "ops/blocks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  m.def("kmeans_exact(Tensor x, Tensor? weights, int block, int k, bool keep_zero) -> Tensor");
  m.def(
      "kmeans_lloyd(Tensor x, Tensor? weights, Tensor? init, int block, int k, bool keep_zero, int start, int seed, "
      "int iterations) -> Tensor");
  m.def(
      "kmeans_minibatch(Tensor x, Tensor? weights, Tensor? init, int block, int k, bool keep_zero, int start, int "
      "seed, int iterations, int batch, int batches) -> Tensor");
  m.def("kmeans_vectors(Tensor x, Tensor? weights, int k, int seed, int iterations) -> (Tensor, Tensor)");
  m.def("codebook_lookup(Tensor codebook, Tensor codes, ScalarType dtype, bool mean) -> Tensor");
  m.def("codebook_gradient(Tensor grad, Tensor codes, int blocks, int size, bool mean) -> Tensor");
}

namespace phiquant {
namespace {

void parallel(int64_t count, const std::function<void(int64_t)>& task) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

bool all_finite(const void* x, Layout l) {
  std::atomic<bool> finite = true;
  for_pieces(l, [&](const Piece& p) {
    if (!affine_kernels().all_finite(shift(x, p.start, l.dtype), p.layout)) finite = false;
  });
  return finite;
}

// The values and weights of one block.
struct Block {
  const void* x;
  const float* weights;
  Layout layout;
};

// Puts 0 among levels[0 .. k - 1), in order; levels has room for k.
void insert_zero(float* levels, int64_t k) {
  float* place = std::lower_bound(levels, levels + k - 1, 0.0f);
  std::copy_backward(place, levels + k - 1, levels + k);
  *place = 0.0f;
}

// The levels of all blocks, [blocks, k]; solve(block, k, levels) finds those of one.
template <class Solve>
Tensor for_blocks(const Tensor& x, const std::optional<Tensor>& weights, const std::optional<Tensor>& init,
                  int64_t block, int64_t k, bool keep_zero, const Solve& solve) {
  const Layout l = layout_of(x, block);
  check(2 <= k && k <= 256, "k must be 2 to 256, got " + std::to_string(k));
  const int64_t own = keep_zero ? k - 1 : k;
  if (weights) {
    check_float32(*weights, "weights");
    check(weights->numel() == x.numel(), "weights must have as many values as x");
  }
  if (init) {
    check_float32(*init, "init");
    check(init->numel() == l.blocks * own, "init must have " + std::to_string(own) + " levels for each block");
  }
  Tensor codebook = torch::stable::new_empty(x, {l.blocks, k}, ScalarType::Float);
  float* levels = static_cast<float*>(codebook.mutable_data_ptr());
  const float* given = init ? static_cast<const float*>(init->const_data_ptr()) : nullptr;
  const auto* h = weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr;
  parallel(l.blocks, [&](int64_t b) {
    float* out = levels + b * k;
    const Block one = {shift(x.const_data_ptr(), b * block, l.dtype), h ? h + b * block : nullptr, {l.dtype, 1, block}};
    if (!all_finite(one.x, one.layout)) {
      std::fill(out, out + k, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    if (given) std::copy(given + b * own, given + (b + 1) * own, out);
    solve(one, own, out);
    if (keep_zero) insert_zero(out, k);
  });
  return codebook;
}

Points points_of(const Block& b, bool skip_zero) {
  return distinct(b.x, b.layout.dtype, b.weights, b.layout.block, skip_zero, parallel);
}

LloydOptions lloyd_options(int64_t start, int64_t seed, int64_t iterations, const std::optional<Tensor>& init) {
  check(0 <= start && start <= 4, "start must be 0 to 4");
  check((start == 4) == init.has_value(), "init must be given exactly for start 4");
  check(iterations >= 0, "iterations must not be negative");
  return {static_cast<Start>(start), static_cast<uint64_t>(seed), iterations};
}

Tensor exact(const Tensor& x, const std::optional<Tensor>& weights, int64_t block, int64_t k, bool keep_zero) {
  return for_blocks(x, weights, std::nullopt, block, k, keep_zero, [&](const Block& b, int64_t own, float* levels) {
    kmeans_exact(points_of(b, keep_zero), own, levels, parallel);
  });
}

Tensor lloyd(const Tensor& x, const std::optional<Tensor>& weights, const std::optional<Tensor>& init, int64_t block,
             int64_t k, bool keep_zero, int64_t start, int64_t seed, int64_t iterations) {
  const LloydOptions options = lloyd_options(start, seed, iterations, init);
  return for_blocks(x, weights, init, block, k, keep_zero, [&](const Block& b, int64_t own, float* levels) {
    kmeans_lloyd(points_of(b, keep_zero), own, options, levels);
  });
}

Tensor minibatch(const Tensor& x, const std::optional<Tensor>& weights, const std::optional<Tensor>& init,
                 int64_t block, int64_t k, bool keep_zero, int64_t start, int64_t seed, int64_t iterations,
                 int64_t batch, int64_t batches) {
  const LloydOptions options = lloyd_options(start, seed, iterations, init);
  check(batch >= 1 && batches >= 1, "batch and batches must be at least 1");
  return for_blocks(x, weights, init, block, k, keep_zero, [&](const Block& b, int64_t own, float* levels) {
    kmeans_minibatch(b.x, b.layout.dtype, b.weights, b.layout.block, own, options,
                     {std::min(batch, b.layout.block), batches}, keep_zero, levels);
  });
}

std::tuple<Tensor, Tensor> vectors(const Tensor& x, const std::optional<Tensor>& weights, int64_t k, int64_t seed,
                                   int64_t iterations) {
  check_float32(x, "x");
  check(x.dim() == 2 && (x.size(1) == 2 || x.size(1) == 4), "x must be [n, 2] or [n, 4]");
  check(x.size(0) > 0, "x has no vectors to cluster");
  check(2 <= k && k <= 256, "k must be 2 to 256, got " + std::to_string(k));
  check(iterations >= 0, "iterations must not be negative");
  if (weights) {
    check_float32(*weights, "weights");
    check(weights->numel() == x.size(0), "weights must have one value for each vector");
  }
  const Vectors v = {static_cast<const float*>(x.const_data_ptr()), x.size(0), x.size(1)};
  const auto* h = weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr;
  Tensor codebook = torch::stable::new_empty(x, {k, v.dim});
  Tensor codes = torch::stable::new_empty(x, {v.n}, ScalarType::Byte);
  auto* levels = static_cast<float*>(codebook.mutable_data_ptr());
  if (!all_finite(v.x, {Dtype::f32, 1, v.n * v.dim})) {
    std::fill_n(levels, k * v.dim, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(static_cast<uint8_t*>(codes.mutable_data_ptr()), v.n, uint8_t{0});
  } else {
    kmeans_vectors(v, h, k, {static_cast<uint64_t>(seed), iterations}, levels,
                   static_cast<uint8_t*>(codes.mutable_data_ptr()), parallel);
  }
  return {codebook, codes};
}

// Values of the codes of `blocks` blocks.
Layout codes_layout(const Tensor& codes, int64_t blocks, int64_t size, Dtype dtype) {
  check(codes.scalar_type() == ScalarType::Byte, "codes must be uint8");
  check_contiguous(codes, "codes");
  check(2 <= size && size <= 256, "a codebook has 2 to 256 levels, not " + std::to_string(size));
  check(blocks > 0 ? codes.numel() % blocks == 0 : codes.numel() == 0,
        std::to_string(blocks) + " codebooks do not divide " + std::to_string(codes.numel()) + " codes evenly");
  return {dtype, blocks, blocks > 0 ? codes.numel() / blocks : 0};
}

Tensor lookup(const Tensor& codebook, const Tensor& codes, ScalarType dtype, bool) {
  check(codebook.dim() == 2, "codebook must be [blocks, size]");
  const int64_t blocks = codebook.size(0);
  Tensor y = with_large_pages(torch::stable::new_empty(codes, codes.sizes(), dtype));
  const Layout l = codes_layout(codes, blocks, codebook.size(1), dtype_of(y, "dtype"));
  if (blocks == 0) return y;
  const Grid grid = grid_of(0, codebook.size(1) - 1, false, static_cast<int64_t>(Format::table), codebook, blocks);
  const std::vector<float> ones(static_cast<size_t>(blocks), 1.0f);
  const auto* c = static_cast<const int8_t*>(codes.const_data_ptr());
  void* out = y.mutable_data_ptr();
  for_pieces(l, [&](const Piece& p) {
    affine_kernels().dequantize(c + p.start, p.layout, {ones.data() + p.block, nullptr}, shift(grid, p.block),
                                shift(out, p.start, l.dtype));
  });
  return y;
}

Tensor codebook_gradient(const Tensor& grad, const Tensor& codes, int64_t blocks, int64_t size, bool mean) {
  check_contiguous(grad, "grad");
  check(codes.numel() == grad.numel(), "codes must have as many values as grad");
  const Layout l = codes_layout(codes, blocks, size, dtype_of(grad, "grad"));
  const int64_t block = l.block;
  Tensor result = torch::stable::new_empty(grad, {blocks, size}, ScalarType::Float);
  auto* out = static_cast<float*>(result.mutable_data_ptr());
  const void* g = grad.const_data_ptr();
  const auto* c = static_cast<const uint8_t*>(codes.const_data_ptr());
  // Pieces of a fixed length, added in order: the sums do not depend on the number of threads.
  const int64_t length = std::max<int64_t>(1, std::min(block, kLongBlock));
  const int64_t pieces = (block + length - 1) / length;
  std::vector<double> sums(static_cast<size_t>(blocks * pieces * size));
  std::vector<int64_t> counts(mean ? sums.size() : 0);
  parallel(blocks * pieces, [&](int64_t i) {
    const int64_t start = i / pieces * block + i % pieces * length;
    const int64_t n = std::min(length, (i / pieces + 1) * block - start);
    cluster_sums(shift(g, start, l.dtype), l.dtype, c + start, n, size, &sums[i * size]);
    if (mean) cluster_sizes(c + start, n, size, &counts[i * size]);
  });
  for (int64_t i = 0; i < blocks * size; ++i) {
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t at = (i / size * pieces + p) * size + i % size;
      sum += sums[at];
      if (mean) count += counts[at];
    }
    out[i] = static_cast<float>(count > 0 ? sum / static_cast<double>(count) : sum);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) {
  m.impl("kmeans_exact", TORCH_BOX(&exact));
  m.impl("kmeans_lloyd", TORCH_BOX(&lloyd));
  m.impl("kmeans_minibatch", TORCH_BOX(&minibatch));
  m.impl("kmeans_vectors", TORCH_BOX(&vectors));
  m.impl("codebook_lookup", TORCH_BOX(&lookup));
  m.impl("codebook_gradient", TORCH_BOX(&codebook_gradient));
}

}  // namespace phiquant
