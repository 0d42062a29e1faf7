// The extension module: CPU level, build info, and the byte writers of the file formats over numpy
// arrays. Importing it registers torch.ops.phiquant. No torch headers here: they and pybind11 collide
// in torch before 2.13.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/cpu.h"
#include "core/pack.h"

namespace py = pybind11;

namespace phiquant {

void bind_pack_dense(py::module_& m);
void bind_gguf(py::module_& m);

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

Array<int32_t> pack_int32_array(const Array<int8_t>& codes) {
  if (codes.ndim() != 2 || codes.shape(1) % 8 != 0) {
    throw std::invalid_argument("codes must have shape [rows, cols], cols a multiple of 8");
  }
  Array<int32_t> out({codes.shape(0), codes.shape(1) / 8});
  auto* data = reinterpret_cast<uint32_t*>(out.mutable_data());
  const int64_t words = out.size();
  py::gil_scoped_release release;
  phiquant::pack_int32(codes.data(), words, data);
  return out;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = PHIQUANT_TORCH_VERSION;  // the version compiled against; the stable ABI runs on 2.11 and later
  info["compiler"] = __VERSION__;
  py::list levels;
  for (const Level level : available_levels()) levels.append(level_name(level));
  info["cpu_levels"] = levels;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "phiquant's C++ core: importing it registers torch.ops.phiquant.";
  m.def("build_info", &build_info, "torch version compiled against, compiler, CPU levels that can run here");
  m.def(
      "cpu_level", [] { return level_name(cpu_level()); }, "the CPU level in use: scalar, avx2, avx512 or avx512vnni");
  m.def(
      "set_cpu_level", [](const std::string& name) { set_cpu_level(level_from_name(name)); }, py::arg("name"),
      "use this CPU level from now on; ValueError if it is unknown or this CPU lacks it");
  bind_gguf(m);
  m.def("pack_int32", &pack_int32_array, py::arg("codes"),
        "int8 codes in -8..7 [rows, cols] -> int32 [rows, cols / 8], code j + 8 in bits 4 (j % 8)");
  bind_pack_dense(m);
}

}  // namespace phiquant
