# The kernels' own machine-independent code, run without a GPU: nvcc makes PTX of every kernel, and
# tests/ptx interprets it. `check_ptx` builds and runs the tests; it needs nvcc and no GPU. It runs the
# matrix products too where the build compiles them, which takes CUTLASS.
find_program(QUAVER_NVCC nvcc HINTS ENV CUDACXX PATHS /usr/local/cuda/bin)
if(NOT QUAVER_NVCC)
  message(STATUS "check_ptx left out: no nvcc was found")
  return()
endif()

find_program(QUAVER_PTX_PYTHON NAMES python3 python REQUIRED)

set(ptx_dir ${CMAKE_BINARY_DIR}/ptx)
set(ptx_files "")
foreach(source IN LISTS kernel_sources)
  get_filename_component(name ${source} NAME_WE)
  add_custom_command(OUTPUT ${ptx_dir}/${name}.ptx
    COMMAND ${CMAKE_COMMAND} -E make_directory ${ptx_dir}
    COMMAND ${QUAVER_NVCC} -ptx -arch=sm_90a -std=c++17 -O3 ${QUAVER_CUDA_ARITHMETIC}
      -I ${CMAKE_SOURCE_DIR}/include -I ${CMAKE_SOURCE_DIR}/csrc
      -MD -MF ${ptx_dir}/${name}.d -o ${ptx_dir}/${name}.ptx ${source}
    DEPENDS ${source} DEPFILE ${ptx_dir}/${name}.d VERBATIM)
  list(APPEND ptx_files ${ptx_dir}/${name}.ptx)
endforeach()
add_custom_target(ptx_files DEPENDS ${ptx_files})

# Objects, not an archive: the driver installs itself, and replaces operator new.
file(GLOB ptx_sources CONFIGURE_DEPENDS tests/ptx/*.cpp)
add_library(quaver_ptx OBJECT EXCLUDE_FROM_ALL ${ptx_sources})
target_include_directories(quaver_ptx PUBLIC tests/ptx)
target_link_libraries(quaver_ptx PUBLIC quaver_simt)
target_compile_definitions(quaver_ptx PRIVATE QUAVER_PTX_DIR="${ptx_dir}")
target_compile_options(quaver_ptx PRIVATE -march=native)  # it runs where it is built

add_custom_target(ptx_tests DEPENDS ptx_files)
add_custom_target(check_ptx
  COMMAND ${CMAKE_CTEST_COMMAND} --output-on-failure --no-tests=error -R "_ptx$" VERBATIM USES_TERMINAL)
add_dependencies(check_ptx ptx_tests)
file(GLOB ptx_test_sources CONFIGURE_DEPENDS tests/cpp/test_cuda_*.cpp)
foreach(source IN LISTS ptx_test_sources)
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name}_ptx EXCLUDE_FROM_ALL ${source})
  target_include_directories(${name}_ptx PRIVATE tests/cpp csrc)
  target_link_libraries(${name}_ptx PRIVATE quaver_core quaver_ptx
    -Wl,--wrap=mmap,--wrap=munmap)
  set_target_properties(${name}_ptx PROPERTIES RUNTIME_OUTPUT_DIRECTORY tests)
  add_test(NAME ${name}_ptx COMMAND ${name}_ptx)
  add_dependencies(ptx_tests ${name}_ptx)
endforeach()

# The interpreter itself, what the products of mma.sync do on it, and below the proof that it finds
# faults.
foreach(name test_interpreter test_asynchronous test_mma)
  add_executable(${name}_ptx EXCLUDE_FROM_ALL tests/ptx/tests/${name}.cpp)
  target_include_directories(${name}_ptx PRIVATE tests/cpp csrc)
  target_link_libraries(${name}_ptx PRIVATE quaver_core quaver_ptx -Wl,--wrap=mmap,--wrap=munmap)
  set_target_properties(${name}_ptx PROPERTIES RUNTIME_OUTPUT_DIRECTORY tests)
  add_test(NAME ${name}_ptx COMMAND ${name}_ptx)
  add_dependencies(ptx_tests ${name}_ptx)
endforeach()

# The matrix products: their object files hold their PTX, and the host code that ships, which calls
# a CUDA runtime of ours.
if(TARGET quaver_gemm AND NOT QUAVER_BINDING)
  find_program(QUAVER_CUOBJDUMP cuobjdump HINTS ${CMAKE_SOURCE_DIR}/build/cuobjdump/nvidia/cu13/bin
    REQUIRED)
  add_custom_command(OUTPUT ${ptx_dir}/.gemm
    COMMAND ${CMAKE_COMMAND} -E make_directory ${ptx_dir}
    COMMAND ${QUAVER_PTX_PYTHON} ${CMAKE_SOURCE_DIR}/cmake/extract_ptx.py ${QUAVER_CUOBJDUMP} ${ptx_dir}
      $<TARGET_OBJECTS:quaver_gemm>
    COMMAND ${CMAKE_COMMAND} -E touch ${ptx_dir}/.gemm
    DEPENDS cmake/extract_ptx.py $<TARGET_OBJECTS:quaver_gemm> COMMAND_EXPAND_LISTS VERBATIM)
  add_custom_target(gemm_ptx_files DEPENDS ${ptx_dir}/.gemm)
  add_executable(test_gemm_ptx EXCLUDE_FROM_ALL tests/ptx/tests/test_gemm.cpp
    tests/ptx/runtime/runtime.cpp $<TARGET_OBJECTS:quaver_gemm>)
  target_include_directories(test_gemm_ptx PRIVATE tests/cpp csrc)
  target_include_directories(test_gemm_ptx SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_link_libraries(test_gemm_ptx PRIVATE quaver_core quaver_ptx -Wl,--wrap=mmap,--wrap=munmap)
  set_target_properties(test_gemm_ptx PROPERTIES RUNTIME_OUTPUT_DIRECTORY tests
    LINKER_LANGUAGE CXX CUDA_RUNTIME_LIBRARY None)
  add_test(NAME test_gemm_ptx COMMAND test_gemm_ptx)
  set_tests_properties(test_gemm_ptx PROPERTIES COST 100)  # the longest begins first
  add_dependencies(test_gemm_ptx gemm_ptx_files)
  add_dependencies(ptx_tests test_gemm_ptx)
endif()

add_test(NAME mutations_ptx COMMAND ${QUAVER_PTX_PYTHON}
  ${CMAKE_SOURCE_DIR}/tests/ptx/mutations.py ${CMAKE_BINARY_DIR})
set_tests_properties(mutations_ptx PROPERTIES RUN_SERIAL ON)  # it runs several programs itself

# What kernels do, counted: a program for each file.
add_custom_target(count_ptx)
file(GLOB count_sources CONFIGURE_DEPENDS tests/ptx/count/*.cpp)
foreach(source IN LISTS count_sources)
  get_filename_component(name ${source} NAME_WE)
  add_executable(count_${name}_ptx EXCLUDE_FROM_ALL ${source})
  target_include_directories(count_${name}_ptx PRIVATE tests/cpp csrc)
  target_link_libraries(count_${name}_ptx PRIVATE quaver_core quaver_ptx -Wl,--wrap=mmap,--wrap=munmap)
  set_target_properties(count_${name}_ptx PROPERTIES RUNTIME_OUTPUT_DIRECTORY bench/count)
  add_dependencies(count_${name}_ptx ptx_files)
  add_dependencies(count_ptx count_${name}_ptx)
endforeach()
