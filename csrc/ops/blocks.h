// What the ops share: checks of arguments, tensors as blocks, and their sharing among threads.
//
// Errors of the caller are std::invalid_argument, which arrives in Python as ValueError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/affine.h"
#include "core/large_pages.h"

namespace phiquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Values below which one thread is faster than two (waking a thread costs 10 to 50 microseconds).
constexpr int64_t kGrain = 32 * 1024;
// A block longer than this is cut in pieces, and its range is found in a pass of its own.
constexpr int64_t kLongBlock = 64 * 1024;
static_assert(kGrain == kSumPiece, "threads that sum pieces of a block must keep the order of additions");
// Bits of a stored code, and those that a value may be rounded to where it is decoded at once.
constexpr int kCodeBits = 8;
constexpr int kRoundedBits = 16;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      throw std::invalid_argument(std::string(name) + " must be float32, bfloat16 or float16, but it is " +
                                  torch::headeronly::toString(t.scalar_type()));
  }
}

inline size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline void check(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

inline void check_contiguous(const Tensor& t, const char* name) {
  check(t.is_contiguous(), std::string(name) + " must be contiguous; call .contiguous() first");
}

inline void check_float32(const Tensor& t, const char* name) {
  check(t.scalar_type() == ScalarType::Float, std::string(name) + " must be float32");
  check_contiguous(t, name);
}

inline void check_same(const Tensor& t, const Tensor& x, const char* name) {
  check_contiguous(t, name);
  check(t.scalar_type() == x.scalar_type() && t.numel() == x.numel(),
        std::string(name) + " must have the dtype and the number of values of x");
}

// x as blocks that share the parameters in `scale`.
inline Layout layout_of(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& offset, Dtype dtype) {
  check_contiguous(x, "x");
  check_float32(scale, "scale");
  const int64_t blocks = scale.numel();
  if (offset) {
    check_float32(*offset, "offset");
    check(offset->numel() == blocks, "offset must have as many values as scale");
  }
  check(blocks > 0 ? x.numel() % blocks == 0 : x.numel() == 0, "x has " + std::to_string(x.numel()) +
                                                                   " values, which " + std::to_string(blocks) +
                                                                   " scales do not divide into blocks of one size");
  return {dtype, blocks, blocks > 0 ? x.numel() / blocks : 0};
}

inline Layout layout_of(const Tensor& x, int64_t block) {
  check_contiguous(x, "x");
  check(block > 0 ? x.numel() % block == 0 : x.numel() == 0,
        "x has " + std::to_string(x.numel()) + " values, which blocks of " + std::to_string(block) + " do not divide");
  return {dtype_of(x, "x"), block > 0 ? x.numel() / block : 0, block};
}

inline BlockParams params_of(const Tensor& scale, const std::optional<Tensor>& offset) {
  return {static_cast<const float*>(scale.const_data_ptr()),
          offset ? static_cast<const float*>(offset->const_data_ptr()) : nullptr};
}

// What codes stand for: the last two arguments of the ops that read or write codes. format: 0 for the
// integers qmin..qmax, 1 to 5 for minifloats, 6 for a table of `levels` [1 or blocks, size] (core/types.h).
// bits: that integers may have; more than 8 where no code is written, which activations of runtimes have.
inline Grid grid_of(int64_t qmin, int64_t qmax, bool minimum, int64_t format = 0,
                    const std::optional<Tensor>& levels = std::nullopt, int64_t blocks = 1, int bits = kCodeBits) {
  check(0 <= format && format <= 6, "format must be 0 to 6");
  check(levels.has_value() == (format == 6), "levels are given for format 6, a table, and for no other");
  const int64_t most = (int64_t{1} << bits) - 1;
  check(-(most + 1) / 2 <= qmin && qmin < qmax && qmax <= most && qmax - qmin <= most,
        "codes must fit in " + std::to_string(bits) + " bits: got qmin " + std::to_string(qmin) + ", qmax " +
            std::to_string(qmax));
  if (format == 0) {
    return {static_cast<float>(qmin), static_cast<float>(qmax), minimum ? Offset::minimum : Offset::zero_point};
  }
  check(!minimum && qmin == 0, "only integers have a minimum or codes below 0");
  if (format < 6) {
    const float largest = kMinifloats[format].largest;
    return {-largest, largest, Offset::zero_point, static_cast<Format>(format)};
  }
  check_float32(*levels, "levels");
  check(levels->dim() == 2 && (levels->size(0) == 1 || levels->size(0) == blocks) && levels->size(1) >= 2 &&
            levels->size(1) <= 256,
        "levels must be [1, size] or [" + std::to_string(blocks) + ", size], one row per block, size 2 to 256");
  const auto* values = static_cast<const float*>(levels->const_data_ptr());
  const int64_t size = levels->size(1);
  return {.qmin = values[0],
          .qmax = values[size - 1],
          .format = Format::table,
          .levels = values,
          .size = static_cast<int>(size),
          .per_block = levels->size(0) > 1};
}

inline RangeSpec range_spec_of(int64_t qmin, int64_t qmax, int64_t rule, int64_t storage, int64_t format = 0,
                               const std::optional<Tensor>& levels = std::nullopt, int bits = kCodeBits) {
  check(0 <= rule && rule <= 5, "rule must be 0 to 5");
  check(0 <= storage && storage <= 4, "storage must be 0 to 4");
  const Rule r = static_cast<Rule>(rule);
  check(format == 0 || r == Rule::absmax || r == Rule::absmean || (r == Rule::signed_absmax && format == 6),
        "floats and tables have the rules absmax and absmean, tables signed_absmax too");
  check(r != Rule::absmax || qmax > 0, "absmax needs a positive qmax");
  check(r != Rule::minimum || qmin == 0, "a grid with a minimum needs qmin 0");
  check(r != Rule::twn || (qmin == -1 && qmax == 1), "twn is the rule of the codes -1, 0, 1");
  check(storage != 3 || r == Rule::absmax, "a scale stored as e8m0 has the rule absmax");
  const Grid grid = grid_of(qmin, qmax, r == Rule::minimum, format, levels, 1, bits);
  check(r != Rule::absmax || grid.qmax > 0.0f, "absmax needs a positive largest level");
  check(r != Rule::signed_absmax || grid.qmin < 0.0f, "signed_absmax needs a lowest level below 0");
  return {grid, r, static_cast<Storage>(storage)};
}

// y, whose memory was just allocated.
inline Tensor with_large_pages(Tensor y) {
  ask_for_large_pages(y.mutable_data_ptr(), static_cast<size_t>(y.numel()) * y.element_size());
  return y;
}

inline Tensor output_like(const Tensor& x) { return with_large_pages(torch::stable::empty_like(x)); }

// int8 or uint8 codes in the shape of x.
inline Tensor codes_like(const Tensor& x, int64_t qmin) {
  return with_large_pages(torch::stable::new_empty(x, x.sizes(), qmin < 0 ? ScalarType::Char : ScalarType::Byte));
}

// A run of values that one thread works on: whole blocks, or a piece of one long block.
struct Piece {
  int64_t block;  // index of the first block
  int64_t start;  // index of the first value
  Layout layout;
};

// Calls f(Piece) for pieces that cover all values, on several threads. Results do not depend on the cut.
template <class F>
void for_pieces(Layout l, const F& f) {
  if (l.blocks == 0 || l.block == 0) return;
  if (l.block <= kLongBlock) {
    const int64_t grain = std::max<int64_t>(1, kGrain / l.block);
    torch::stable::parallel_for(0, l.blocks, grain, [&](int64_t begin, int64_t end) {
      f(Piece{begin, begin * l.block, {l.dtype, end - begin, l.block}});
    });
    return;
  }
  const int64_t pieces = (l.block + kGrain - 1) / kGrain;
  torch::stable::parallel_for(0, l.blocks * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = i % pieces * kGrain;
      const int64_t length = std::min(kGrain, l.block - offset);
      f(Piece{i / pieces, i / pieces * l.block + offset, {l.dtype, 1, length}});
    }
  });
}

template <class T>
T* shift(T* p, int64_t values, Dtype dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(p) + values * static_cast<int64_t>(size_of(dtype));
}

inline BlockParams shift(BlockParams p, int64_t block) {
  return {p.scale + block, p.offset ? p.offset + block : nullptr, p.inverse ? p.inverse + block : nullptr};
}

inline Grid shift(Grid grid, int64_t block) {
  if (grid.per_block) grid.levels += block * grid.size;
  return grid;
}

}  // namespace phiquant
