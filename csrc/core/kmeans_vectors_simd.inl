// The nearest level of each vector, a vector in each lane of V (vec_avx2.h, vec_avx512.h).
#include "core/kmeans_vectors.h"

namespace phiquant {
namespace {

template <class V>
struct VectorLevels {
  using F = typename V::F;
  static constexpr int64_t W = V::width;

  template <int64_t dim>
  static void assign_dim(Vectors v, const float* codebook, int64_t k, uint8_t* codes) {
    for (int64_t start = 0; start < v.n; start += W) {
      const int64_t valid = v.n - start < W ? v.n - start : W;
      float columns[dim][W] = {};
      for (int64_t i = 0; i < valid; ++i) {
        for (int64_t j = 0; j < dim; ++j) columns[j][i] = v.x[(start + i) * dim + j];
      }
      F x[dim];
      for (int64_t j = 0; j < dim; ++j) x[j] = V::load(columns[j]);
      F least = distance<dim>(x, codebook);
      F code = V::set1(0.0f);
      for (int64_t c = 1; c < k; ++c) {
        const F d = distance<dim>(x, codebook + c * dim);
        const auto nearer = V::less(d, least);
        least = V::select(nearer, d, least);
        code = V::select(nearer, V::set1(static_cast<float>(c)), code);
      }
      int8_t found[W];
      V::store_codes(found, code);
      for (int64_t i = 0; i < valid; ++i) codes[start + i] = static_cast<uint8_t>(found[i]);
    }
  }

  template <int64_t dim>
  static F distance(const F* x, const float* level) {
    F sum = V::set1(0.0f);
    for (int64_t j = 0; j < dim; ++j) {
      const F e = V::sub(x[j], V::set1(level[j]));
      sum = V::add(sum, V::mul(e, e));
    }
    return sum;
  }

  static void assign(Vectors v, const float* codebook, int64_t k, uint8_t* codes) {
    if (v.dim == 2) return assign_dim<2>(v, codebook, k, codes);
    assign_dim<4>(v, codebook, k, codes);
  }

  static constexpr VectorKernels table = {.assign = assign};
};

}  // namespace
}  // namespace phiquant
