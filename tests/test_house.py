"""Rules of the source tree that a compiler does not check."""

import ast
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import quaver

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "release"
CODE = {".h", ".cuh", ".cpp", ".cu", ".py"}
FOLDERS = ("include", "csrc", "python", "bench", "cmake", "examples")


def files(*folders, suffixes=CODE):
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and path.is_file():
                yield path


def offences(paths, pattern):
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


PACKAGE = ROOT / "python" / "quaver"


def modules():
    """{dotted name: path} of the package."""
    found = {}
    for path in files("python/quaver", suffixes={".py"}):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name, path, known):
    """The modules that `name` imports, at the top or inside functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            inside = [f"{base}.{alias.name}" for alias in node.names]
            yield from (module for module in inside if module in known)
            # `from package import name` of what its __init__ gathers is an import of __init__.
            if base in known and any(module not in known for module in inside):
                yield base


def circle(graph):
    """The modules of one import circle, in order; [] where there is none."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in graph[module]:
            found = visit(other)
            if found:
                return found
        done.add(path.pop())
        return []

    return next((found for module in sorted(graph) if (found := visit(module))), [])


def test_the_modules_import_each_other_in_no_circle():
    known = modules()
    graph = {name: sorted(set(imports(name, path, known))) for name, path in known.items()}
    assert len(graph["quaver.tensor"]) and len(graph) > 50
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    # The native module, quaver._C, is no part of the graph.
    graph["quaver._load"] = [m for m in graph["quaver._load"] if m != "quaver"]
    assert circle(graph) == []


def test_torch_and_python_headers_stay_in_their_rooms():
    rooms = {ROOT / "csrc" / "torch", ROOT / "csrc" / "python"}
    paths = [
        path
        for path in files("include", "csrc", "tests/cpp", "bench/cpp", suffixes=CODE - {".py"})
        if not rooms & set(path.parents)
    ]
    assert paths
    assert offences(paths, r'#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)') == []


def test_the_binding_is_torch_only_and_the_module_python_only():
    assert offences(files("csrc/torch"), r'#\s*include\s*[<"](pybind11|Python\.h|ATen|c10)') == []
    assert offences(files("csrc/python"), r'#\s*include\s*[<"](torch|ATen|c10)') == []


def test_ranks_are_known_below_the_optimizers_and_not_above_them():
    package = ROOT / "python" / "quaver"
    below = [package / name for name in ("tensor_ops.py", "grad.py", "placement.py")]
    below += [
        *files("python/quaver/checkpoint"),
        *files("python/quaver/optim"),
        *files("python/quaver/nn"),
        *files("python/quaver/comm"),
    ]
    assert offences(below, r"^\s*(from|import) .*(?<!torch\.)\bdistributed\b(?! as dist)") == []


def test_finite_maxima_are_named_in_one_place():
    paths = [path for path in files(*FOLDERS) if path != ROOT / "include/quaver/dtype.h"]
    paths += [ROOT / "setup.py"]
    assert offences(paths, r"(?<![\w.])(448|57344)(?![\w])") == []


def python_functions(path):
    """(first line, last line) of every function's statements, from the one after its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
            yield body[0].lineno, node.end_lineno


def cpp_functions(path):
    """(first line, last line) of every block of clang-formatted code but a type's or a namespace's,
    from the line of its opening brace to the first closing one with no deeper an indent. The
    library's schemas are a table, not a function."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if re.match(r" *(namespace|class|struct|union|enum|extern|template|//|STABLE_TORCH)", line):
            continue
        if not line.endswith("{"):
            continue
        indent = len(line) - len(line.lstrip())
        closing = re.compile(rf" {{0,{indent}}}\}}")
        rest = enumerate(lines[number:], number + 1)
        yield number, next((n for n, other in rest if closing.match(other)), number)


def test_files_and_functions_are_short():
    """A longer file or function holds two things and is split between them."""
    paths = list(files("include", "csrc", "python"))
    assert paths
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    long = [
        f"{path.relative_to(ROOT)}:{first} to {last}"
        for path in paths
        for first, last in (python_functions if path.suffix == ".py" else cpp_functions)(path)
        if last - first >= 60
    ]
    assert long == []


def test_versions_agree():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert quaver.__version__ == declared
    assert quaver.build_info()["version"] == declared
    assert re.search(r"^## \[?([\d.]+)", changelog, re.M)[1] == declared
    if "site-packages" in quaver.__file__:  # installed from a wheel
        assert version("quaver") == declared


def test_the_library_serves_the_oldest_torch_it_promises():
    assert quaver.build_info()["torch_target"] == "2.11"


# An inline function compiled with AVX-512 flags, left outside of its namespace, would be a copy
# that the linker may choose for the portable code, and a variable initialised at load would run
# there: both crash an older CPU.
def test_vector_objects_share_no_symbols_and_run_nothing_at_load():
    if not BUILD.is_dir():
        pytest.skip(f"there is no {BUILD.relative_to(ROOT)}: not a built source tree")
    assert shutil.which("nm"), "nm (binutils) is needed to look into the objects"
    isas = quaver.build_info()["cpu_isas_compiled"]
    for isa in isas:
        objects = sorted((BUILD / "CMakeFiles" / f"quaver_simd_{isa}.dir").rglob("*.o"))
        assert objects
        command = ["nm", "-C", "--defined-only", "--extern-only", *map(str, objects)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        symbols = re.findall(r"^[0-9a-f]+ \w (.+)$", output, re.M)
        assert symbols
        assert [name for name in symbols if not name.startswith(f"quaver::cpu::{isa}::")] == []
        command = ["readelf", "-S", "--wide", *map(str, objects)]
        sections = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert ".text" in sections
        assert re.findall(r"\.(?:init_array|ctors)\S*", sections) == []
