// The nearest level of vectors at every CPU level against the reference, and k-means of clusters that are far apart.
#include "core/kmeans_vectors.h"

#include <gtest/gtest.h>

#include <vector>

#include "support.h"

namespace phiquant {
namespace {

TEST(Vectors, EveryLevelAssignsAsTheReference) {
  for (const Level level : available_levels()) {
    const LevelGuard guard(level);
    for (const int64_t dim : {2, 4}) {
      for (const int64_t n : {0, 1, 7, 15, 16, 17, 100}) {
        for (const int64_t k : {1, 2, 255, 256}) {
          std::vector<float> x = awkward(n * dim, 1);
          std::vector<float> codebook = gaussian(k * dim, 2);
          if (k > 2) std::copy_n(codebook.begin(), dim, codebook.end() - dim);  // a tie: the first is taken
          std::vector<uint8_t> found(static_cast<size_t>(n), 1), expected(found.size(), 2);
          vector_kernels().assign({x.data(), n, dim}, codebook.data(), k, found.data());
          vectors_ref.assign({x.data(), n, dim}, codebook.data(), k, expected.data());
          EXPECT_EQ(found, expected) << level_name(level) << " " << dim << " " << n << " " << k;
        }
      }
    }
  }
}

TEST(Vectors, FarClustersGetALevelEach) {
  std::vector<float> x = gaussian(4 * 1000, 3, 0.1f);
  for (size_t i = 0; i < x.size(); ++i) x[i] += i / 4 % 3 == 0 ? 10.0f : i / 4 % 3 == 1 ? -10.0f : 0.0f;
  std::vector<float> codebook(12);
  std::vector<uint8_t> codes(1000);
  kmeans_vectors({x.data(), 1000, 4}, nullptr, 3, {1, 50}, codebook.data(), codes.data(), serial);
  for (size_t i = 3; i < 1000; ++i) EXPECT_EQ(codes[i], codes[i % 3]);
  for (size_t j = 0; j < 4; ++j) EXPECT_NEAR(codebook[codes[0] * 4 + j], 10.0f, 0.03f);
}

}  // namespace
}  // namespace phiquant
