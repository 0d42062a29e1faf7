// Packing of codes into dense bytes: checks, allocation, threads.
#include "core/bits.h"

#include <algorithm>
#include <atomic>

#include "ops/blocks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  // codes: int8 or uint8, contiguous; stored as code - low. bits: 1 to 8, or 0 for trits (core/bits.h).
  m.def("pack_codes(Tensor codes, int bits, int low) -> Tensor");
  // The `count` codes in packed: int8 if low < 0, else uint8.
  m.def("unpack_codes(Tensor packed, int count, int bits, int low) -> Tensor");
}

namespace phiquant {
namespace {

void check_bits(int64_t bits, int64_t low) {
  check(0 <= bits && bits <= 8, "bits must be 1 to 8, or 0 for trits, not " + std::to_string(bits));
  check(-128 <= low && low <= 127, "low must be -128 to 127, not " + std::to_string(low));
}

// Calls f(first code, codes, first byte) on several threads, for runs that begin at a byte's border.
template <class F>
void for_runs(int64_t count, int64_t bits, const F& f) {
  const int64_t unit = bits == 0 ? kTritsPerByte : 8;
  const int64_t bytes = bits == 0 ? 1 : bits;
  torch::stable::parallel_for(0, (count + unit - 1) / unit, 2 * kGrain / unit, [&](int64_t begin, int64_t end) {
    f(begin * unit, std::min(end * unit, count) - begin * unit, begin * bytes);
  });
}

int64_t bytes_of(int64_t count, int64_t bits) {
  return bits == 0 ? packed_trit_bytes(count) : packed_bytes(count, static_cast<int>(bits));
}

Tensor pack_codes(const Tensor& codes, int64_t bits, int64_t low) {
  const ScalarType type = codes.scalar_type();
  check(type == ScalarType::Char || type == ScalarType::Byte, "codes must be int8 or uint8");
  check_contiguous(codes, "codes");
  check_bits(bits, low);
  const int64_t count = codes.numel();
  Tensor packed = with_large_pages(torch::stable::new_empty(codes, {bytes_of(count, bits)}, ScalarType::Byte));
  const auto* in = static_cast<const int8_t*>(codes.const_data_ptr());
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::atomic<bool> valid = true;
  for_runs(count, bits, [&](int64_t first, int64_t n, int64_t byte) {
    const int from = static_cast<int>(low);
    const bool fits = bits == 0 ? bit_kernels().pack_trits(in + first, n, from, out + byte)
                                : bit_kernels().pack_bits(in + first, n, static_cast<int>(bits), from, out + byte);
    if (!fits) valid = false;
  });
  const int64_t last = low + (bits == 0 ? 2 : (int64_t{1} << bits) - 1);
  check(valid, "codes hold a value outside " + std::to_string(low) + " .. " + std::to_string(last));
  return packed;
}

Tensor unpack_codes(const Tensor& packed, int64_t count, int64_t bits, int64_t low) {
  check(packed.scalar_type() == ScalarType::Byte, "packed must be uint8");
  check_contiguous(packed, "packed");
  check_bits(bits, low);
  check(0 <= count && count <= packed.numel() * 8, "count must be 0 or more, and at most 8 for each packed byte");
  check(packed.numel() == bytes_of(count, bits), std::to_string(count) + " codes take " +
                                                     std::to_string(bytes_of(count, bits)) + " bytes, but packed has " +
                                                     std::to_string(packed.numel()));
  Tensor codes =
      with_large_pages(torch::stable::new_empty(packed, {count}, low < 0 ? ScalarType::Char : ScalarType::Byte));
  const auto* in = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* out = static_cast<int8_t*>(codes.mutable_data_ptr());
  std::atomic<bool> valid = true;
  for_runs(count, bits, [&](int64_t first, int64_t n, int64_t byte) {
    const int from = static_cast<int>(low);
    if (bits != 0) return bit_kernels().unpack_bits(in + byte, n, static_cast<int>(bits), from, out + first);
    if (!bit_kernels().unpack_trits(in + byte, n, from, out + first)) valid = false;
  });
  check(valid, "packed holds a byte above 242, which is not five trits");
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) {
  m.impl("pack_codes", TORCH_BOX(&pack_codes));
  m.impl("unpack_codes", TORCH_BOX(&unpack_codes));
}

}  // namespace phiquant
