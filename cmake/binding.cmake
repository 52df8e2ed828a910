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
set_source_files_properties(csrc/cpu/isa.cpp csrc/gemm_choice.cpp
  csrc/torch/library.cpp PROPERTIES
  COMPILE_OPTIONS -fvisibility=default)

list(JOIN isas "," isa_names)
list(JOIN QUAVER_CUDA_ARCHS "," arch_names)
Python_add_library(quaver_module MODULE WITH_SOABI csrc/python/module.cpp)
set_target_properties(quaver_module PROPERTIES OUTPUT_NAME _C
  BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN/lib")
target_include_directories(quaver_module SYSTEM PRIVATE ${pybind11_include})
target_compile_definitions(quaver_module PRIVATE
  QUAVER_VERSION="${PROJECT_VERSION}" QUAVER_TORCH_VERSION="${torch_version}"
  QUAVER_TORCH_TARGET=${torch_target} QUAVER_ISAS="${isa_names}"
  QUAVER_ARCHS="$<$<TARGET_EXISTS:quaver_cuda>:${arch_names}>"
  QUAVER_CUTLASS="${cutlass_version}")
target_link_libraries(quaver_module PRIVATE quaver_flags quaver_ops)
target_link_options(quaver_module PRIVATE -Wl,--allow-shlib-undefined)

install(TARGETS quaver_ops LIBRARY DESTINATION lib COMPONENT python)
install(TARGETS quaver_module LIBRARY DESTINATION . COMPONENT python)
