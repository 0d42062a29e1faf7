// The extension module: CPU level, build info, and the byte writers of the file formats over numpy
// arrays. Importing it registers torch.ops.phiquant. No torch headers here: they and pybind11 collide
// in torch before 2.13.
#include <pybind11/pybind11.h>

#include <string>

#include "core/cpu.h"

namespace py = pybind11;

namespace phiquant {

void bind_pack_dense(py::module_& m);
void bind_gguf(py::module_& m);

namespace {

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
  bind_pack_dense(m);
}

}  // namespace phiquant
