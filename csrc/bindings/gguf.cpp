// The packers of GGUF's block types over numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "core/pack_gguf.h"

namespace py = pybind11;

namespace phiquant {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
template <class T>
using Part = std::optional<Array<T>>;

// The values of a part; null where the type has none. Their number must be `expected`, 0 without it.
template <class T>
const T* values(const Part<T>& part, int64_t expected, const std::string& name) {
  const int64_t size = part ? part->size() : 0;
  if (size != expected) {
    throw std::invalid_argument(name + ": " + std::to_string(size) + " values, expected " + std::to_string(expected));
  }
  return part ? part->data() : nullptr;
}

Array<uint8_t> pack_gguf(const std::string& name, const py::buffer& codes, const Part<uint16_t>& d,
                         const Part<uint16_t>& m, const Part<uint8_t>& scales, const Part<uint8_t>& minimums) {
  const GgufType* type = gguf_type(name);
  if (type == nullptr) throw std::invalid_argument("GGUF has no type " + name + " that codes are packed into");
  const py::buffer_info info = codes.request();
  if (info.itemsize != 1 || info.ndim != 1 || info.strides[0] != 1) {
    throw std::invalid_argument("codes must be a contiguous array of bytes with one axis");
  }
  if (info.size % type->values != 0) {
    throw std::invalid_argument("codes of " + name + " come in blocks of " + std::to_string(type->values) + "; got " +
                                std::to_string(info.size) + " values");
  }
  const int64_t blocks = info.size / type->values;
  const int64_t groups = type->group > 0 ? info.size / type->group : 0;
  GgufParts parts;
  parts.codes = static_cast<const uint8_t*>(info.ptr);
  parts.d = values(d, type->d ? blocks : 0, name + ", d");
  parts.m = values(m, type->m ? blocks : 0, name + ", m");
  parts.scales = values(scales, groups, name + ", scales");
  parts.minimums = values(minimums, type->minimums ? groups : 0, name + ", minimums");
  Array<uint8_t> out(blocks * type->bytes);
  uint8_t* data = out.mutable_data();
  py::gil_scoped_release release;
  type->pack(parts, blocks, data);
  return out;
}

}  // namespace

void bind_gguf(py::module_& m) {
  m.def("pack_gguf", &pack_gguf, py::arg("type"), py::arg("codes"), py::arg("d") = py::none(),
        py::arg("m") = py::none(), py::arg("scales") = py::none(), py::arg("minimums") = py::none(),
        "codes (bytes) [n] and the parameters of the type (csrc/core/pack_gguf.h) -> bytes of its blocks");
}

}  // namespace phiquant
