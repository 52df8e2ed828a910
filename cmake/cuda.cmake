# The CUDA backend. auto builds it where nvcc, kernels and a torch that can use them are; on builds
# it for any torch (the library loads on one without CUDA too) and fails if it cannot.
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
set(cutlass_version "")
set(missing "")
if(NOT QUAVER_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "QUAVER_CUDA must be auto, on or off, got '${QUAVER_CUDA}'")
elseif(QUAVER_CUDA STREQUAL "off")
  return()
elseif(NOT cuda_sources)
  set(missing "csrc/cuda has no kernels")
elseif(QUAVER_CUDA STREQUAL "auto" AND QUAVER_BINDING
       AND NOT EXISTS ${torch_dir}/lib/libtorch_cuda.so)
  set(missing "torch ${torch_version} has no CUDA (QUAVER_CUDA=on builds the backend all the same)")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(missing "no nvcc was found (set CUDACXX or put it on PATH)")
  else()
    list(APPEND CMAKE_MODULE_PATH ${CMAKE_SOURCE_DIR}/cmake)
    if("90a" IN_LIST QUAVER_CUDA_ARCHS)
      find_package(Cutlass)
    endif()
    if("90a" IN_LIST QUAVER_CUDA_ARCHS AND NOT Cutlass_FOUND)
      set(missing "CUTLASS was not found (third_party/README.md says how to get it)")
    endif()
  endif()
endif()
if(missing)
  if(QUAVER_CUDA STREQUAL "on")
    message(FATAL_ERROR "QUAVER_CUDA=on: ${missing}")
  endif()
  message(STATUS "CUDA backend left out: ${missing}")
  return()
endif()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)

add_library(quaver_cuda_flags INTERFACE)
target_link_libraries(quaver_cuda_flags INTERFACE quaver_flags)
target_compile_options(quaver_cuda_flags INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:
  ${QUAVER_CUDA_ARITHMETIC} -Xcompiler=-Wall,-Wextra>)

# Hopper's matrix products are written for sm_90a alone, on CUTLASS; what surrounds them, and the
# products of mma.sync, runs on other machines too and needs none of it.
if("90a" IN_LIST QUAVER_CUDA_ARCHS)
  # One translation unit for each row of the table of tactics: a kernel of CUTLASS takes a minute and
  # up to 4 GB to compile, so the machine's memory says how many compile at a time.
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS csrc/gemm_tactics.h)
  file(READ csrc/gemm_tactics.h rows)
  string(REGEX MATCHALL "X\\([^)]*\\)" rows "${rows}")
  set(gemm_sources "")
  foreach(row IN LISTS rows)
    string(REGEX MATCH "X\\(([a-z0-9_]+), (.*)\\)" row "${row}")
    set(source ${CMAKE_BINARY_DIR}/gemm/gemm_sm90_${CMAKE_MATCH_1}.cu)
    file(CONFIGURE OUTPUT ${source} CONTENT
      "#include \"cuda/gemm_sm90.h\"\nQUAVER_GEMM_UNIT(${CMAKE_MATCH_1}, ${CMAKE_MATCH_2})\n")
    list(APPEND gemm_sources ${source})
  endforeach()
  cmake_host_system_information(RESULT memory QUERY TOTAL_PHYSICAL_MEMORY)
  math(EXPR gemm_jobs "${memory} / 8192")
  if(gemm_jobs LESS 1)
    set(gemm_jobs 1)
  endif()
  set_property(GLOBAL APPEND PROPERTY JOB_POOLS gemm=${gemm_jobs})
  add_library(quaver_gemm OBJECT ${gemm_sources})
  target_link_libraries(quaver_gemm PRIVATE quaver_cuda_flags)
  target_include_directories(quaver_gemm PRIVATE csrc)
  target_compile_options(quaver_gemm PRIVATE -gencode=arch=compute_90a,code=sm_90a
    "SHELL:-isystem ${Cutlass_INCLUDE_DIRS}")
  if(NOT QUAVER_BINDING)  # PTX beside the machine code costs nothing, and tests/ptx runs it
    target_compile_options(quaver_gemm PRIVATE -gencode=arch=compute_90a,code=compute_90a)
  endif()
  set_target_properties(quaver_gemm PROPERTIES JOB_POOL_COMPILE gemm)
endif()

add_library(quaver_cuda STATIC ${cuda_sources}
  $<$<TARGET_EXISTS:quaver_gemm>:$<TARGET_OBJECTS:quaver_gemm>>)
target_link_libraries(quaver_cuda PUBLIC quaver_cuda_flags)
target_compile_definitions(quaver_cuda PUBLIC QUAVER_HAVE_CUDA
  PRIVATE $<$<TARGET_EXISTS:quaver_gemm>:QUAVER_HAVE_HOPPER>)
foreach(arch IN LISTS QUAVER_CUDA_ARCHS)
  set_property(SOURCE ${cuda_sources} APPEND PROPERTY COMPILE_OPTIONS
    -gencode=arch=compute_${arch},code=sm_${arch})
endforeach()
if(Cutlass_FOUND)
  set(cutlass_version ${Cutlass_VERSION})
endif()
