# The imported target `torch_stable`: torch's headers and the two libraries behind its stable ABI.
# find_package(Torch) is not used: for a CUDA torch it fails where no CUDA toolkit is installed,
# and the stable ABI needs nothing else.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import os, torch; print(torch.__version__); print(os.path.dirname(torch.__file__))"
  OUTPUT_VARIABLE torch_facts OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_missing)
if(torch_missing)
  message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}; install it first: pip install 'torch>=2.11'")
endif()
string(REPLACE "\n" ";" torch_facts "${torch_facts}")
list(GET torch_facts 0 PHIQUANT_TORCH_VERSION)
list(GET torch_facts 1 torch_dir)

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${torch_dir}/include)
target_link_libraries(torch_stable INTERFACE
  ${torch_dir}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX} ${torch_dir}/lib/libc10${CMAKE_SHARED_LIBRARY_SUFFIX})
# 2.11: the oldest torch that the built extension loads in.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
