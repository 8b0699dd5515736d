# LibTorch's libraries as a target, without find_package(Torch): that is fatal for a CUDA build of torch on a
# machine without the CUDA toolkit. The build and the installed package both read this file.

# torchmargin_find_libtorch(RESULT): the folder with LibTorch's lib/ and include/, or RESULT-NOTFOUND. Looked for in
# TORCHMARGIN_TORCH_DIR, Torch_DIR, what find_package(Torch) found, the folders given after RESULT, CMAKE_PREFIX_PATH.
function(torchmargin_find_libtorch result)
  set(candidates "${TORCHMARGIN_TORCH_DIR}" "${TORCH_INSTALL_PREFIX}")
  if(Torch_DIR)
    list(APPEND candidates "${Torch_DIR}/../../..")
  endif()
  string(REPLACE ":" ";" environment_prefixes "$ENV{CMAKE_PREFIX_PATH}")
  foreach(prefix ${CMAKE_PREFIX_PATH} ${environment_prefixes})
    list(APPEND candidates "${prefix}" "${prefix}/../..") # LibTorch itself, or torch.utils.cmake_prefix_path
  endforeach()
  set(${result} "${result}-NOTFOUND" PARENT_SCOPE)
  foreach(folder ${candidates} ${ARGN})
    if(EXISTS "${folder}/lib/libtorch_cpu.so" AND EXISTS "${folder}/share/cmake/Torch/TorchConfigVersion.cmake")
      get_filename_component(folder "${folder}" ABSOLUTE)
      set(${result} "${folder}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

# torchmargin_libtorch_version(RESULT FOLDER): "2.11.0".
function(torchmargin_libtorch_version result folder)
  file(READ "${folder}/share/cmake/Torch/TorchConfigVersion.cmake" text)
  if(NOT text MATCHES "PACKAGE_VERSION \"([0-9]+\\.[0-9]+\\.[0-9]+)")
    message(FATAL_ERROR "torchmargin: cannot read torch's version in '${folder}/share/cmake/Torch'.")
  endif()
  set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# torchmargin_libtorch_cxx_standard(RESULT FOLDER): the oldest C++ that torch's headers compile as: 17, and 20 since torch 2.14.
function(torchmargin_libtorch_cxx_standard result folder)
  set(${result} 17 PARENT_SCOPE)
  file(STRINGS "${folder}/include/torch/csrc/api/include/torch/all.h" demand REGEX "#error C\\+\\+[0-9]+ or later")
  if(demand MATCHES "C\\+\\+([0-9]+) or later")
    set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
  endif()
endfunction()

# torchmargin_import_libtorch(TARGET FOLDER [IMPORTED]): an interface target with libtorch_cpu, libc10 and the headers.
function(torchmargin_import_libtorch target folder)
  add_library(${target} INTERFACE ${ARGN})
  get_filename_component(include "${folder}/include" REALPATH)
  target_include_directories(${target} SYSTEM INTERFACE "${include}" "${include}/torch/csrc/api/include")
  target_link_libraries(${target} INTERFACE "${folder}/lib/libtorch_cpu.so" "${folder}/lib/libc10.so")
  # A CUDA build of torch from PyPI needs libraries of NVIDIA's Python packages at link time.
  file(GLOB nvidia_libraries "${folder}/../nvidia/*/lib")
  foreach(path ${nvidia_libraries} "${folder}/lib")
    target_link_options(${target} INTERFACE "-Wl,-rpath-link,${path}")
  endforeach()
endfunction()

# torchmargin_keep_library(TARGET LIBRARY FOLDER): LIBRARY (a path, or a generator expression) and libtorch.so, which
# brings CUDA, stay linked although no symbol may be used: loading the library registers the ops. One item, in quotes for
# the shell: CMake may move or drop items, and passes those that begin with a dash as they are.
function(torchmargin_keep_library target library folder)
  target_link_libraries(${target} INTERFACE
    "-Wl,--push-state,--no-as-needed,\"${library}\",\"${folder}/lib/libtorch.so\",--pop-state")
endfunction()
