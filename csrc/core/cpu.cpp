#include "core/cpu.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef PHIQUANT_X86
#include <cpuid.h>
#endif

namespace phiquant {
namespace {

constexpr Level kLevels[] = {Level::scalar, Level::avx2, Level::avx512, Level::avx512vnni};

#ifdef PHIQUANT_X86
// __builtin_cpu_supports("f16c") is unknown to clang before 16.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

bool has(Level level) {
#ifdef PHIQUANT_X86
  switch (level) {
    case Level::scalar:
      return true;
    case Level::avx2:
      return __builtin_cpu_supports("avx2") && has_f16c();
    case Level::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Level::avx512vnni:
      return has(Level::avx512) && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return level == Level::scalar;
}

Level first_level() {
  if (const char* wish = std::getenv("PHIQUANT_CPU_LEVEL"); wish != nullptr && *wish != '\0') {
    const Level level = level_from_name(wish);
    if (!has(level)) {
      throw std::invalid_argument("PHIQUANT_CPU_LEVEL is " + std::string(wish) +
                                  ", but this CPU cannot run it; best here: " + level_name(available_levels().back()));
    }
    return level;
  }
  return available_levels().back();
}

std::atomic<Level>& current() {
  static std::atomic<Level> level{first_level()};
  return level;
}

}  // namespace

Level cpu_level() { return current().load(std::memory_order_relaxed); }

void set_cpu_level(Level level) {
  if (!has(level)) {
    throw std::invalid_argument("this CPU cannot run level " + level_name(level) +
                                "; best here: " + level_name(available_levels().back()));
  }
  current().store(level, std::memory_order_relaxed);
}

std::vector<Level> available_levels() {
  std::vector<Level> levels;
  for (const Level level : kLevels) {
    if (has(level)) levels.push_back(level);
  }
  return levels;
}

std::string level_name(Level level) {
  switch (level) {
    case Level::scalar:
      return "scalar";
    case Level::avx2:
      return "avx2";
    case Level::avx512:
      return "avx512";
    case Level::avx512vnni:
      return "avx512vnni";
  }
  return "unknown";
}

Level level_from_name(const std::string& name) {
  for (const Level level : kLevels) {
    if (name == level_name(level)) return level;
  }
  throw std::invalid_argument("unknown CPU level '" + name + "'; levels are scalar, avx2, avx512, avx512vnni");
}

}  // namespace phiquant
