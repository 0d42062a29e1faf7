// Lloyd's algorithm over vectors: pieces of a fixed length, whose sums are added in order.
#include "core/kmeans_vectors.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/cpu.h"
#include "core/kmeans_random.h"

namespace phiquant {
namespace {

constexpr int64_t kPiece = 1 << 14;
// Vectors, for each level, among which k-means++ draws.
constexpr int64_t kDrawn = 64;

// k-means++ on a sample: each next level a vector drawn with the odds of its squared distance to the nearest so far.
void plus_plus(Vectors v, const float* weights, int64_t k, Random& random, float* codebook) {
  const int64_t count = std::min(v.n, kDrawn * k);
  std::vector<int64_t> sample(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) sample[i] = count == v.n ? i : random.below(v.n);
  std::vector<double> odds(sample.size());
  std::vector<double> nearest(sample.size(), std::numeric_limits<double>::infinity());
  for (int64_t i = 0; i < count; ++i) odds[i] = weights ? weights[sample[i]] : 1.0;
  for (int64_t c = 0; c < k; ++c) {
    double total = 0.0;
    for (const double o : odds) total += o;
    double share = random.uniform() * total;
    int64_t drawn = 0;
    while (drawn + 1 < count && share >= odds[drawn]) share -= odds[drawn++];
    float* level = codebook + c * v.dim;
    std::copy_n(v.x + sample[drawn] * v.dim, v.dim, level);
    for (int64_t i = 0; i < count; ++i) {
      double distance = 0.0;
      for (int64_t j = 0; j < v.dim; ++j) {
        const double e = double{v.x[sample[i] * v.dim + j]} - level[j];
        distance += e * e;
      }
      nearest[i] = std::min(nearest[i], distance);
      odds[i] = nearest[i] * (weights ? weights[sample[i]] : 1.0);
    }
  }
}

// Weight, then sum of each component, of the vectors with each code: [k, 1 + dim].
void add_by_code(Vectors v, const float* weights, const uint8_t* codes, double* sums) {
  for (int64_t i = 0; i < v.n; ++i) {
    const double h = weights ? weights[i] : 1.0;
    double* sum = sums + codes[i] * (v.dim + 1);
    sum[0] += h;
    for (int64_t j = 0; j < v.dim; ++j) sum[1 + j] += h * v.x[i * v.dim + j];
  }
}

}  // namespace

const VectorKernels& vector_kernels() {
#ifdef PHIQUANT_X86
  return by_level(vectors_ref, vectors_avx2, vectors_avx512);
#else
  return vectors_ref;
#endif
}

void kmeans_vectors(Vectors v, const float* weights, int64_t k, VectorOptions options, float* codebook, uint8_t* codes,
                    const Parallel& parallel) {
  Random random(options.seed);
  plus_plus(v, weights, k, random, codebook);
  const int64_t pieces = (v.n + kPiece - 1) / kPiece;
  const int64_t width = k * (v.dim + 1);
  std::vector<double> sums(static_cast<size_t>(pieces * width));
  std::vector<float> before(static_cast<size_t>(k * v.dim));
  for (int64_t iteration = 0;; ++iteration) {
    parallel(pieces, [&](int64_t p) {
      const int64_t start = p * kPiece;
      const Vectors piece = {v.x + start * v.dim, std::min(kPiece, v.n - start), v.dim};
      vector_kernels().assign(piece, codebook, k, codes + start);
      std::fill_n(&sums[p * width], width, 0.0);
      add_by_code(piece, weights ? weights + start : nullptr, codes + start, &sums[p * width]);
    });
    if (iteration == options.iterations) return;
    std::copy_n(codebook, k * v.dim, before.begin());
    for (int64_t p = 1; p < pieces; ++p) {
      for (int64_t i = 0; i < width; ++i) sums[i] += sums[p * width + i];
    }
    for (int64_t c = 0; c < k; ++c) {
      const double* sum = &sums[c * (v.dim + 1)];
      for (int64_t j = 0; j < v.dim && sum[0] > 0.0; ++j) {
        codebook[c * v.dim + j] = static_cast<float>(sum[1 + j] / sum[0]);
      }
    }
    if (std::equal(before.begin(), before.end(), codebook)) return;
  }
}

}  // namespace phiquant
