#include "core/cpu.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>

#include "core/affine.h"
#include "support.h"

namespace phiquant {
namespace {

TEST(Cpu, ScalarIsAlwaysThereAndLevelsRise) {
  const auto levels = available_levels();
  ASSERT_FALSE(levels.empty());
  EXPECT_EQ(levels.front(), Level::scalar);
  EXPECT_TRUE(std::is_sorted(levels.begin(), levels.end()));
}

TEST(Cpu, NamesGoBothWays) {
  for (const Level level : {Level::scalar, Level::avx2, Level::avx512, Level::avx512vnni}) {
    EXPECT_EQ(level_from_name(level_name(level)), level);
  }
  EXPECT_THROW(level_from_name("sse9"), std::invalid_argument);
}

TEST(Cpu, LevelChoosesTheKernels) {
  const LevelGuard guard(Level::scalar);
  EXPECT_EQ(&affine_kernels(), &affine_ref);
  for (const Level level : available_levels()) {
    set_cpu_level(level);
    EXPECT_EQ(cpu_level(), level);
    EXPECT_EQ(&affine_kernels() == &affine_ref, level == Level::scalar);
  }
}

}  // namespace
}  // namespace phiquant
