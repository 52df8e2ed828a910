"""Builds the native library and module with CMake and ninja; the rest is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "release"


class FreshBuild(build):
    def run(self):
        # Files of an earlier build would be packed too.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def architectures():
    """CUDA architectures of this machine's GPUs, with ; between; Hopper's where there is none."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        said = ""
    found = sorted({line.strip().replace(".", "") for line in said.split("\n") if "." in line})
    return ";".join("90a" if arch == "90" else arch for arch in found) or "90a"


class CMakeBuild(build_ext):
    def run(self):
        home = ROOT / "python" if self.inplace or self.editable_mode else self.build_lib
        package = Path(home).resolve() / "quaver"
        # The cmake and ninja of this interpreter's environment come before the system's.
        tools = Path(sys.executable).parent
        env = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}

        def cmake(*args):
            subprocess.run(["cmake", *map(str, args)], check=True, env=env)

        cmake(
            *("-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DQUAVER_PYTHONS={os.environ.get('QUAVER_PYTHONS', '')}",
            f"-DQUAVER_CUDA={os.environ.get('QUAVER_CUDA', 'auto')}",
            f"-DQUAVER_CUDA_ARCHS={os.environ.get('QUAVER_CUDA_ARCHS') or architectures()}",
            f"-DQUAVER_CUTLASS_DIR={os.environ.get('QUAVER_CUTLASS_DIR', '')}",
        )
        cmake("--build", BUILD)
        cmake("--install", BUILD, "--component", "python", "--prefix", package)


class Wheel(bdist_wheel):
    def get_tag(self):
        """Names every Python whose module is inside; a wheel of an editable install holds none."""
        python, abi, platform = super().get_tag()
        built = Path(self.get_finalized_command("build").build_lib, "quaver")
        versions = sorted(path.name.split("-")[1] for path in built.glob("_C.cpython-*.so"))
        pythons = ".".join(f"cp{version}" for version in versions)
        return pythons or python, pythons or abi, platform


setup(
    ext_modules=[Extension("quaver._C", [])],
    cmdclass={"bdist_wheel": Wheel, "build": FreshBuild, "build_ext": CMakeBuild},
)
