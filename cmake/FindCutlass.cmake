# CUTLASS's headers: QUAVER_CUTLASS_DIR, else what `make cuda` put into build/cutlass, else the
# nvidia-cutlass package of the interpreter.
if(Python_EXECUTABLE)
  execute_process(COMMAND ${Python_EXECUTABLE} -c
    "import sysconfig; print(sysconfig.get_path('purelib'), end='')" OUTPUT_VARIABLE purelib)
endif()
set(hints ${CMAKE_SOURCE_DIR}/build/cutlass ${purelib})
if(QUAVER_CUTLASS_DIR)
  set(hints ${QUAVER_CUTLASS_DIR})
endif()
unset(Cutlass_INCLUDE_DIR CACHE)
find_path(Cutlass_INCLUDE_DIR cutlass/version.h PATHS ${hints} NO_DEFAULT_PATH
  PATH_SUFFIXES . include cutlass_library/source/include)
if(Cutlass_INCLUDE_DIR)
  file(STRINGS ${Cutlass_INCLUDE_DIR}/cutlass/version.h numbers
    REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9;]" "" numbers "${numbers}")
  list(JOIN numbers "." Cutlass_VERSION)
endif()
set(Cutlass_INCLUDE_DIRS ${Cutlass_INCLUDE_DIR})
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Cutlass REQUIRED_VARS Cutlass_INCLUDE_DIR
  VERSION_VAR Cutlass_VERSION)
