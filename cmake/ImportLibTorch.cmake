# Imports LibTorch's CPU libraries as the target torchmargin_torch, without
# find_package(Torch): that is fatal for a CUDA build of torch on a machine without the
# CUDA toolkit. Set TORCHMARGIN_TORCH_DIR to the folder that holds torch's lib/ and
# include/; without it the torch of Python3_EXECUTABLE (or of `python3`) is used.
# Sets TORCHMARGIN_TORCH_VERSION.

if(NOT TORCHMARGIN_TORCH_DIR)
  find_package(Python3 COMPONENTS Interpreter QUIET)
  if(Python3_Interpreter_FOUND)
    execute_process(
      COMMAND "${Python3_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_paths()['platlib'] + '/torch')"
      OUTPUT_VARIABLE TORCHMARGIN_TORCH_DIR
      OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
endif()
if(NOT EXISTS "${TORCHMARGIN_TORCH_DIR}/lib/libtorch_cpu.so")
  message(FATAL_ERROR
    "torchmargin: no LibTorch in '${TORCHMARGIN_TORCH_DIR}'. Install torch for this Python, or pass "
    "-DTORCHMARGIN_TORCH_DIR=<folder with lib/libtorch_cpu.so and include/>.")
endif()

file(READ "${TORCHMARGIN_TORCH_DIR}/share/cmake/Torch/TorchConfigVersion.cmake" torch_version_file)
string(REGEX MATCH "PACKAGE_VERSION \"([0-9]+\\.[0-9]+\\.[0-9]+)" _ "${torch_version_file}")
set(TORCHMARGIN_TORCH_VERSION "${CMAKE_MATCH_1}")
if(NOT TORCHMARGIN_TORCH_VERSION)
  message(FATAL_ERROR "torchmargin: cannot read torch's version in '${TORCHMARGIN_TORCH_DIR}/share/cmake/Torch'.")
endif()

add_library(torchmargin_torch INTERFACE)
target_include_directories(torchmargin_torch SYSTEM INTERFACE
  "${TORCHMARGIN_TORCH_DIR}/include"
  "${TORCHMARGIN_TORCH_DIR}/include/torch/csrc/api/include")
target_link_libraries(torchmargin_torch INTERFACE
  "${TORCHMARGIN_TORCH_DIR}/lib/libtorch_cpu.so"
  "${TORCHMARGIN_TORCH_DIR}/lib/libc10.so")
target_link_directories(torchmargin_torch INTERFACE "${TORCHMARGIN_TORCH_DIR}/lib")
# A CUDA build of torch needs libraries of NVIDIA's Python packages at link time.
file(GLOB torch_nvidia_libraries "${TORCHMARGIN_TORCH_DIR}/../nvidia/*/lib")
set(TORCHMARGIN_TORCH_RPATH_LINK "")
foreach(folder ${torch_nvidia_libraries})
  list(APPEND TORCHMARGIN_TORCH_RPATH_LINK "-Wl,-rpath-link,${folder}")
endforeach()
message(STATUS "torchmargin: torch ${TORCHMARGIN_TORCH_VERSION} in ${TORCHMARGIN_TORCH_DIR}")
