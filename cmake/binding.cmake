# The ops library and the Python module.

# Built against any torch from 2.11 on, it runs on every torch from 2.11 on.
set(torch_target 0x020b000000000000ULL)
file(GLOB torch_sources CONFIGURE_DEPENDS csrc/torch/*.cpp)
add_library(quaver_ops SHARED ${torch_sources})
set_target_properties(quaver_ops PROPERTIES OUTPUT_NAME quaver SKIP_BUILD_RPATH ON
  INSTALL_RPATH "" LINK_DEPENDS ${CMAKE_SOURCE_DIR}/cmake/exports.map)
target_compile_definitions(quaver_ops PRIVATE TORCH_STABLE_ONLY TORCH_TARGET_VERSION=${torch_target})
target_include_directories(quaver_ops SYSTEM PRIVATE ${torch_dir}/include)
# libtorch.so is named although no symbol comes from it directly: through it the loader finds the
# CUDA half of a torch that has one. There is no path into torch, which is always imported first.
target_link_libraries(quaver_ops PRIVATE
  quaver_flags -Wl,--whole-archive quaver_core -Wl,--no-whole-archive
  -Wl,--no-as-needed ${torch_dir}/lib/libtorch.so ${torch_dir}/lib/libtorch_cpu.so)
target_link_options(quaver_ops PRIVATE
  -Wl,--version-script=${CMAKE_SOURCE_DIR}/cmake/exports.map)
if(NOT QUAVER_SANITIZE)  # whose own symbols are the process's
  target_link_options(quaver_ops PRIVATE -Wl,-z,defs)
endif()
if(TARGET quaver_cuda)
  target_link_libraries(quaver_ops PRIVATE quaver_cuda)
endif()
# The module calls these few functions of the library.
set_source_files_properties(csrc/cpu/isa.cpp csrc/gemm_choice.cpp csrc/gemm_table.cpp
  csrc/torch/library.cpp PROPERTIES
  COMPILE_OPTIONS -fvisibility=default)

list(JOIN isas "," isa_names)
list(JOIN QUAVER_CUDA_ARCHS "," arch_names)
# The library serves every Python; the module is compiled for each, by its headers alone.
function(quaver_python_module target include suffix)
  add_library(${target} MODULE csrc/python/module.cpp)
  set_target_properties(${target} PROPERTIES OUTPUT_NAME _C PREFIX "" SUFFIX ${suffix}
    BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN/lib")
  target_include_directories(${target} SYSTEM PRIVATE ${include} ${pybind11_include})
  target_compile_definitions(${target} PRIVATE
    QUAVER_VERSION="${PROJECT_VERSION}" QUAVER_TORCH_VERSION="${torch_version}"
    QUAVER_TORCH_TARGET=${torch_target} QUAVER_ISAS="${isa_names}"
    QUAVER_ARCHS="$<$<TARGET_EXISTS:quaver_cuda>:${arch_names}>"
    QUAVER_CUDA_RUNTIME="$<$<TARGET_EXISTS:quaver_cuda>:${CMAKE_CUDA_COMPILER_VERSION}>"
    QUAVER_CUTLASS="${cutlass_version}")
  target_link_libraries(${target} PRIVATE quaver_flags quaver_ops)
  target_link_options(${target} PRIVATE -Wl,--allow-shlib-undefined)
  install(TARGETS ${target} LIBRARY DESTINATION . COMPONENT python)
endfunction()

install(TARGETS quaver_ops LIBRARY DESTINATION lib COMPONENT python)
set(suffixes)
foreach(python IN LISTS Python_EXECUTABLE QUAVER_PYTHONS)
  execute_process(COMMAND ${python} -c
    "import sysconfig as s; print(s.get_path('include'), s.get_config_var('EXT_SUFFIX'), sep=';')"
    OUTPUT_VARIABLE found ERROR_VARIABLE problem OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT found)
    message(FATAL_ERROR "QUAVER_PYTHONS: ${python} does not run:\n${problem}")
  endif()
  list(GET found 0 include)
  list(GET found 1 suffix)
  if(NOT EXISTS ${include}/Python.h)
    message(FATAL_ERROR "QUAVER_PYTHONS: ${python} has no headers: there is no ${include}/Python.h")
  endif()
  if(NOT suffix IN_LIST suffixes)
    quaver_python_module(quaver_module${suffix} ${include} ${suffix})
    list(APPEND suffixes ${suffix})
  endif()
endforeach()
