// The list of all ops: the C++ side of the API on one screen.
//
// x, grad, out: float32, bfloat16 or float16, contiguous, `blocks * block` values. scale, offset:
// float32 [blocks]; the values of one block share them. offset is the zero point, or the minimum
// where `minimum` is true. rule: 0 absmax, 1 signed_absmax, 2 zero_point, 3 minimum, 4 absmean, 5 twn.
// format: 0 integers qmin..qmax, 1 e4m3fn, 2 e5m2, 3 e2m1, 4 e1m2, 5 e3m0, 6 a table of `levels`, float32
// [1 or blocks, size] (core/types.h). Codes are int8 if qmin < 0, else uint8.
// storage: 0 float32, 1 bfloat16, 2 float16, 3 e8m0, 4 e4m3 (the last two: of scales alone). The `_out`
// forms write into `out` and return nothing.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(phiquant, m) {
  m.def(
      "quantize(Tensor x, Tensor scale, Tensor? offset, bool minimum, int qmin, int qmax, int format=0, Tensor? "
      "levels=None) -> Tensor");
  m.def(
      "dequantize_out(Tensor codes, Tensor scale, Tensor? offset, bool minimum, Tensor(a!) out, int format=0, Tensor? "
      "levels=None) -> ()");
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor? offset, bool minimum, int qmin, int qmax, int format=0, Tensor? "
      "levels=None) -> Tensor");
  m.def(
      "fake_quantize_out(Tensor x, Tensor scale, Tensor? offset, bool minimum, int qmin, int qmax, Tensor(a!) out, int "
      "format=0, Tensor? levels=None) -> ()");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor? offset, bool minimum, int qmin, int qmax, "
      "int format=0, Tensor? levels=None) -> Tensor");
  m.def(
      "quantize_dynamic(Tensor x, int block, int qmin, int qmax, int rule, int storage, int format=0, Tensor? "
      "levels=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "fake_quantize_dynamic(Tensor x, int block, int qmin, int qmax, int rule, int storage, int format=0, Tensor? "
      "levels=None) -> Tensor");
  m.def(
      "fake_quantize_dynamic_out(Tensor x, int block, int qmin, int qmax, int rule, int storage, Tensor(a!) out, int "
      "format=0, Tensor? levels=None) -> ()");
  m.def(
      "fake_quantize_dynamic_backward(Tensor grad, Tensor x, int block, int qmin, int qmax, int rule, int storage, int "
      "format=0, Tensor? levels=None) -> Tensor");
  m.def("min_max(Tensor x, int block) -> (Tensor, Tensor)");
  m.def(
      "choose_range(Tensor x, int block, int qmin, int qmax, int rule, int storage, int format=0, Tensor? "
      "levels=None) -> (Tensor, Tensor)");
  m.def(
      "range_from_min_max(Tensor lo, Tensor hi, int qmin, int qmax, int rule, int storage, int format=0, Tensor? "
      "levels=None) -> (Tensor, Tensor)");
}
