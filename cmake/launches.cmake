# libquaver.so with the CUDA backend's host code as it ships and its kernels compiled for the host:
# what a GPU's stream would get is counted without one (bench/bench_launches.py).
add_library(quaver_launches SHARED EXCLUDE_FROM_ALL ${torch_sources} tests/cpp/launches/launches.cpp)
set_target_properties(quaver_launches PROPERTIES OUTPUT_NAME quaver
  LIBRARY_OUTPUT_DIRECTORY launches SKIP_BUILD_RPATH ON)
target_compile_definitions(quaver_launches PRIVATE TORCH_STABLE_ONLY
  TORCH_TARGET_VERSION=${torch_target} QUAVER_HAVE_CUDA QUAVER_SIMT)
target_compile_options(quaver_launches PRIVATE -O1)
target_include_directories(quaver_launches PRIVATE csrc)
target_include_directories(quaver_launches SYSTEM PRIVATE ${torch_dir}/include)
target_link_libraries(quaver_launches PRIVATE quaver_flags
  -Wl,--whole-archive quaver_core -Wl,--no-whole-archive quaver_simt
  -Wl,--no-as-needed ${torch_dir}/lib/libtorch.so ${torch_dir}/lib/libtorch_cpu.so)
