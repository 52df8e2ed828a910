# torch is found through the interpreter and not through its CMake package: the stable ABI needs
# its headers and two libraries and none of its flags.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import importlib.metadata as m, importlib.util as u, pybind11
print(u.find_spec('torch').submodule_search_locations[0], m.version('torch'), pybind11.get_include(), sep=';')"
  OUTPUT_VARIABLE found ERROR_VARIABLE problem OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT found)
  message(FATAL_ERROR "${Python_EXECUTABLE} must have torch >= 2.11 and pybind11:\n${problem}")
endif()
list(GET found 0 torch_dir)
list(GET found 1 torch_version)
list(GET found 2 pybind11_include)
if(torch_version VERSION_LESS 2.11)
  message(FATAL_ERROR "torch >= 2.11 is needed, ${Python_EXECUTABLE} has ${torch_version}")
endif()
message(STATUS "torch ${torch_version}: ${torch_dir}")
