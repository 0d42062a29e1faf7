// The gradient of a codebook: grads summed by code.
#include <bit>
#include <cstring>
#include <vector>

#include "core/half.h"
#include "core/kmeans.h"

namespace phiquant {
namespace {

// Neighbouring values often share a code, and adding to a sum that is still being written waits for it.
// With a table for each of kTables neighbours it never is.
constexpr int64_t kTables = 8;
// Room for every uint8, so that a code that is too large does no harm.
constexpr int64_t kRoom = 256;

// add(sum, i): what value i does to the sum of its code.
template <class Sum, class Add, class Out>
void by_code(const uint8_t* codes, int64_t n, int64_t size, Add add, Out* out) {
  static_assert(std::endian::native == std::endian::little);
  std::vector<Sum> tables(static_cast<size_t>(kTables * kRoom));
  Sum* table = tables.data();
  int64_t i = 0;
  for (; i + kTables <= n; i += kTables) {
    uint64_t eight;  // read at once: a load each is what the loop would wait for
    std::memcpy(&eight, codes + i, sizeof eight);
    for (int64_t t = 0; t < kTables; ++t) add(table[t * kRoom + (eight >> (8 * t) & 0xff)], i + t);
  }
  for (; i < n; ++i) add(table[codes[i]], i);
  for (int64_t t = 0; t < kTables; ++t) {
    for (int64_t c = 0; c < size; ++c) out[c] += static_cast<Out>(table[t * kRoom + c]);
  }
}

}  // namespace

void cluster_sums(const void* grad, Dtype dtype, const uint8_t* codes, int64_t n, int64_t size, double* sums) {
  auto sum = [&](const auto* values) {
    by_code<double>(codes, n, size, [=](double& sum, int64_t i) { sum += to_float(values[i]); }, sums);
  };
  switch (dtype) {
    case Dtype::f32:
      return sum(static_cast<const float*>(grad));
    case Dtype::bf16:
      return sum(static_cast<const bf16*>(grad));
    case Dtype::f16:
      return sum(static_cast<const f16*>(grad));
  }
}

void cluster_sizes(const uint8_t* codes, int64_t n, int64_t size, int64_t* counts) {
  by_code<uint32_t>(codes, n, size, [](uint32_t& count, int64_t) { ++count; }, counts);
}

}  // namespace phiquant
