# The kernels' own machine-independent code, run without a GPU: nvcc makes PTX of every kernel except
# the matrix products, and tests/ptx interprets it under the tests of the SIMT shim. `check_ptx`
# builds and runs them; it needs nvcc, no CUTLASS and no GPU.
find_program(QUAVER_NVCC nvcc HINTS ENV CUDACXX PATHS /usr/local/cuda/bin)
if(NOT QUAVER_NVCC)
  message(STATUS "check_ptx left out: no nvcc was found")
  return()
endif()

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

# The interpreter itself, and the proof that it finds faults.
add_executable(test_interpreter_ptx EXCLUDE_FROM_ALL tests/ptx/tests/test_interpreter.cpp)
target_include_directories(test_interpreter_ptx PRIVATE tests/cpp csrc)
target_link_libraries(test_interpreter_ptx PRIVATE quaver_core quaver_ptx
  -Wl,--wrap=mmap,--wrap=munmap)
set_target_properties(test_interpreter_ptx PROPERTIES RUNTIME_OUTPUT_DIRECTORY tests)
add_test(NAME test_interpreter_ptx COMMAND test_interpreter_ptx)
add_dependencies(ptx_tests test_interpreter_ptx)
find_program(QUAVER_PTX_PYTHON NAMES python3 python REQUIRED)
add_test(NAME mutations_ptx COMMAND ${QUAVER_PTX_PYTHON}
  ${CMAKE_SOURCE_DIR}/tests/ptx/mutations.py ${CMAKE_BINARY_DIR})

add_executable(count_ptx EXCLUDE_FROM_ALL tests/ptx/count/count.cpp)
target_include_directories(count_ptx PRIVATE tests/cpp csrc)
target_link_libraries(count_ptx PRIVATE quaver_core quaver_ptx -Wl,--wrap=mmap,--wrap=munmap)
set_target_properties(count_ptx PROPERTIES RUNTIME_OUTPUT_DIRECTORY bench)
add_dependencies(count_ptx ptx_files)
