// Hadamard rotations (core/hadamard.h): check, share the rows among threads, call core. No arithmetic here.
#include "core/hadamard.h"

#include <algorithm>

#include "ops/blocks.h"

namespace phiquant {
namespace {

const float* read(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

void hadamard_out(Tensor x, const Tensor& base, const std::optional<Tensor>& signs, double scale) {
  check_float32(x, "x");
  check_float32(base, "base");
  check(x.dim() == 2 && base.dim() == 2 && base.size(0) == base.size(1), "x and base must be matrices, base square");
  const int64_t m = base.size(0);
  const int64_t n = x.size(1);
  check(0 < m && m <= kHadamardBase && n > 0 && n % m == 0, "base must have 1 to 256 rows, which divide those of x");
  const int64_t power = n / m;
  check((power & (power - 1)) == 0, "a row of x must hold a power of two times the rows of base");
  if (signs) {
    check_float32(*signs, "signs");
    check(signs->numel() == n, "signs must have as many values as a row of x");
  }
  const Hadamard h = {m, power, read(base), signs ? read(*signs) : nullptr, static_cast<float>(scale)};
  auto* values = static_cast<float*>(x.mutable_data_ptr());
  torch::stable::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
    hadamard_kernels().rotate(values + begin * n, end - begin, h);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  m.def("hadamard_out(Tensor(a!) x, Tensor base, Tensor? signs, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) { m.impl("hadamard_out", TORCH_BOX(&hadamard_out)); }

}  // namespace phiquant
