// GPTQ's inner step (core/gptq.h): check, share the rows among threads, call core. No arithmetic here.
#include "core/gptq.h"

#include "ops/blocks.h"

namespace phiquant {
namespace {

// Rows that one thread takes at least: a step of 128 columns over them takes some 20 microseconds.
constexpr int64_t kRows = 64;

void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
  check_float32(t, name);
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols,
        std::string(name) + " must have shape [" + std::to_string(rows) + ", " + std::to_string(cols) + "]");
}

const float* read(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

void gptq_run(const Tensor& target, Tensor weight, const Tensor& feedback, const Tensor& column, const Tensor& scale,
              const std::optional<Tensor>& offset, bool minimum, int64_t qmin, int64_t qmax, Tensor codes,
              int64_t format, const std::optional<Tensor>& levels) {
  check(target.dim() == 2 && scale.dim() == 2 && codes.dim() == 2, "target, scale and codes must be matrices");
  const int64_t columns = target.size(0);
  const int64_t rows = target.size(1);
  const int64_t groups = scale.size(0);
  check(columns <= kGptqColumns, "a run has at most " + std::to_string(kGptqColumns) + " columns");
  check_matrix(target, "target", columns, rows);
  check_matrix(weight, "weight", columns, rows);
  check_matrix(feedback, "feedback", columns, columns);
  check_matrix(scale, "scale", groups, rows);
  if (offset) check_matrix(*offset, "offset", groups, rows);
  check(codes.scalar_type() == (qmin < 0 ? ScalarType::Char : ScalarType::Byte) && codes.size(1) == rows,
        "codes must be int8 if qmin < 0, else uint8, and have as many columns as target");
  check_contiguous(codes, "codes");
  check(groups > 0 && codes.size(0) % groups == 0, "the rows of scale must divide those of codes");
  check(column.scalar_type() == ScalarType::Long && column.numel() == columns, "column must be int64 [columns]");
  check_contiguous(column, "column");
  const auto* places = static_cast<const int64_t*>(column.const_data_ptr());
  for (int64_t k = 0; k < columns; ++k) {
    check(0 <= places[k] && places[k] < codes.size(0), "column must be an index of the rows of codes");
  }
  const Grid grid = grid_of(qmin, qmax, minimum, format, levels, groups * rows);
  const GptqRun run = {columns,
                       rows,
                       codes.size(0) / groups,
                       read(target),
                       static_cast<float*>(weight.mutable_data_ptr()),
                       read(feedback),
                       places,
                       read(scale),
                       offset ? read(*offset) : nullptr,
                       static_cast<int8_t*>(codes.mutable_data_ptr())};
  torch::stable::parallel_for(0, rows, kRows,
                              [&](int64_t begin, int64_t end) { gptq_kernels().run(run, grid, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(phiquant, m) {
  m.def(
      "gptq_run(Tensor target, Tensor(a!) weight, Tensor feedback, Tensor column, Tensor scale, Tensor? offset, "
      "bool minimum, int qmin, int qmax, Tensor(b!) codes, int format=0, Tensor? levels=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(phiquant, CPU, m) { m.impl("gptq_run", TORCH_BOX(&gptq_run)); }

}  // namespace phiquant
