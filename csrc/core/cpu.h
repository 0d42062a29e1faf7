// Which instruction set the kernels use: found once, overridable, settable by tests.
#pragma once

#include <string>
#include <vector>

namespace phiquant {

// avx512vnni is avx512 with dot products of bytes: it differs where integers are multiplied.
enum class Level { scalar, avx2, avx512, avx512vnni };

// The level in use. On the first call: the best that this CPU has, or the one that the environment
// variable PHIQUANT_CPU_LEVEL names (scalar, avx2, avx512, avx512vnni).
// Throws std::invalid_argument if the variable names a level that is unknown or that the CPU lacks.
Level cpu_level();

// Use `level` from now on. Throws std::invalid_argument if this CPU lacks it.
void set_cpu_level(Level level);

// The levels that this CPU can run, lowest first.
std::vector<Level> available_levels();

// The one of these kernel tables that the level in use asks for.
template <class Table>
const Table& by_level(const Table& scalar, const Table& avx2, const Table& avx512, const Table& avx512vnni) {
  switch (cpu_level()) {
    case Level::avx512vnni:
      return avx512vnni;
    case Level::avx512:
      return avx512;
    case Level::avx2:
      return avx2;
    case Level::scalar:
      break;
  }
  return scalar;
}

// The same for kernels to which dot products of bytes are no help.
template <class Table>
const Table& by_level(const Table& scalar, const Table& avx2, const Table& avx512) {
  return by_level(scalar, avx2, avx512, avx512);
}

std::string level_name(Level level);
Level level_from_name(const std::string& name);

}  // namespace phiquant
