// Which instruction set the kernels use: found once, overridable, settable by tests.
#pragma once

#include <string>
#include <vector>

namespace phiquant {

enum class Level { scalar, avx2, avx512 };

// The level in use. On the first call: the best that this CPU has, or the one that the environment
// variable PHIQUANT_CPU_LEVEL names (scalar, avx2, avx512).
// Throws std::invalid_argument if the variable names a level that is unknown or that the CPU lacks.
Level cpu_level();

// Use `level` from now on. Throws std::invalid_argument if this CPU lacks it.
void set_cpu_level(Level level);

// The levels that this CPU can run, lowest first.
std::vector<Level> available_levels();

// The one of these kernel tables that the level in use asks for.
template <class Table>
const Table& by_level(const Table& scalar, const Table& avx2, const Table& avx512) {
  switch (cpu_level()) {
    case Level::avx512:
      return avx512;
    case Level::avx2:
      return avx2;
    case Level::scalar:
      break;
  }
  return scalar;
}

std::string level_name(Level level);
Level level_from_name(const std::string& name);

}  // namespace phiquant
