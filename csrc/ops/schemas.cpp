// The list of all ops: the C++ side of the API on one screen.
//
// x, grad, out: float32, bfloat16 or float16, contiguous, `blocks * block` values. scale, offset:
// float32 [blocks]; the values of one block share them. offset is the zero point, or the minimum
// where `minimum` is true. rule: 0 absmax, 1 signed_absmax, 2 zero_point, 3 minimum (core/types.h).
// storage: 0 float32, 1 bfloat16, 2 float16. The `_out` forms write into `out` and return nothing.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(phiquant, m) {
  m.def("quantize(Tensor x, Tensor scale, Tensor? offset, bool minimum, int qmin, int qmax) -> Tensor");
  m.def("dequantize_out(Tensor codes, Tensor scale, Tensor? offset, bool minimum, Tensor(a!) out) -> ()");
  m.def("fake_quantize(Tensor x, Tensor scale, Tensor? offset, bool minimum, int qmin, int qmax) -> Tensor");
  m.def(
      "fake_quantize_out(Tensor x, Tensor scale, Tensor? offset, bool minimum, int qmin, int qmax, Tensor(a!) out) "
      "-> ()");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor? offset, bool minimum, int qmin, int qmax) "
      "-> Tensor");
  m.def("quantize_dynamic(Tensor x, int block, int qmin, int qmax, int rule, int storage) -> (Tensor, Tensor, Tensor)");
  m.def("fake_quantize_dynamic(Tensor x, int block, int qmin, int qmax, int rule, int storage) -> Tensor");
  m.def(
      "fake_quantize_dynamic_out(Tensor x, int block, int qmin, int qmax, int rule, int storage, Tensor(a!) out) "
      "-> ()");
  m.def(
      "fake_quantize_dynamic_backward(Tensor grad, Tensor x, int block, int qmin, int qmax, int rule, int storage) "
      "-> Tensor");
  m.def("min_max(Tensor x, int block) -> (Tensor, Tensor)");
  m.def("choose_range(Tensor x, int block, int qmin, int qmax, int rule, int storage, bool mse) -> (Tensor, Tensor)");
  m.def("range_from_min_max(Tensor lo, Tensor hi, int qmin, int qmax, int rule, int storage) -> (Tensor, Tensor)");
}
