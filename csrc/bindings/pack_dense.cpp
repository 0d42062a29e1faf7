// pack_dense and pack_columns over numpy arrays.
#include "core/pack_dense.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

namespace py = pybind11;

namespace phiquant {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;

void check(const Bytes& codes, int bits) {
  if (codes.ndim() != 2) throw std::invalid_argument("codes must have shape [rows, cols]");
  if (bits != 1 && bits != 2 && bits != 4 && bits != 8) {
    throw std::invalid_argument("codes are packed in 1, 2, 4 or 8 bits, not " + std::to_string(bits));
  }
}

Bytes pack_rows(const Bytes& codes, int bits, uint8_t add) {
  check(codes, bits);
  const int64_t rows = codes.shape(0), cols = codes.shape(1);
  Bytes out({rows, dense_bytes(cols, bits)});
  auto* data = out.mutable_data();
  py::gil_scoped_release release;
  pack_dense(codes.data(), rows, cols, bits, add, data);
  return out;
}

void pack_into_columns(const Bytes& codes, int bits, uint8_t add, int64_t first, int64_t width, Bytes& out) {
  check(codes, bits);
  const int64_t rows = codes.shape(0), cols = codes.shape(1);
  if (first < 0 || width < 0 || rows > width || first > width - rows || out.size() != dense_bytes(cols * width, bits)) {
    throw std::invalid_argument("out must have the bytes of [cols, width], and the rows must lie within width");
  }
  auto* data = out.mutable_data();
  py::gil_scoped_release release;
  pack_columns(codes.data(), rows, cols, bits, add, first, width, data);
}

}  // namespace

void bind_pack_dense(py::module_& m) {
  m.def("pack_dense", &pack_rows, py::arg("codes"), py::arg("bits"), py::arg("add") = 0,
        "uint8 codes [rows, cols] -> (code + add) mod 2^bits side by side, lowest bits first, [rows, ceil(cols bits / "
        "8)]");
  m.def(
      "pack_columns", &pack_into_columns, py::arg("codes"), py::arg("bits"), py::arg("add"), py::arg("first"),
      py::arg("width"), py::arg("out").noconvert(),
      "puts rows [first, first + rows) of a matrix [width, cols] into its packed transpose `out`, uint8 and 0 before");
}

}  // namespace phiquant
