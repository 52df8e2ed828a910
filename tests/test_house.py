"""Rules of the source tree that a compiler does not check."""

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


def test_finite_maxima_are_named_in_one_place():
    paths = [path for path in files(*FOLDERS) if path != ROOT / "include/quaver/dtype.h"]
    paths += [ROOT / "setup.py"]
    assert offences(paths, r"(?<![\w.])(448|57344)(?![\w])") == []


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
# that the linker may choose for the portable code, and so a crash on an older CPU.
def test_vector_objects_share_no_symbols():
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
