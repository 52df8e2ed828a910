"""The build that a GPU report measures: made here, or carried from a machine that can compile.

QUAVER_REPORT_BUILD=build|carried|auto; auto takes a carried build of these very sources, which
saves minutes, and builds otherwise. Carried is a wheel in dist/ or a built python/quaver/,
beside the dist/carried.json of `make carried`. Leaves {work}/build.json: how, the folder for
PYTHONPATH, the C++ bench, build_info and recipes.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP = ROOT / "dist" / "carried.json"
SOURCES = ("csrc", "include", "cmake", "bench/cpp", "CMakeLists.txt", "setup.py", "pyproject.toml")
BENCH = "bench_cuda"
BENCHES = ("build/release/bench", "build/cuda/bench", "dist")
ASK = """
import json, torch, quaver
from quaver import machine, recipe
print(json.dumps({"info": quaver.build_info(), "recipes": recipe.names(), "ops": machine.backends(),
    "torch": torch.__version__, "machine": machine.describe(), "why_not": machine.why_not_cuda()}))
"""


class BuildError(Exception):
    pass


def digest():
    """SHA-256 of what a build is made of."""
    files = []
    for name in SOURCES:
        path = ROOT / name
        files += [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    total = hashlib.sha256()
    for path in sorted(p for p in files if "__pycache__" not in p.parts):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def commit():
    """The commit of this tree, "+changes" behind it where there are some; None outside of git."""

    def git(*args):
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)

    head = git("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")


def missing_tools():
    """The tools that this machine lacks to build the CUDA backend."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    missing = [
        tool for tool in ("cmake", "ninja", "make", "c++") if not shutil.which(tool, path=path)
    ]
    if not (shutil.which(os.environ.get("CUDACXX", "nvcc"), path=f"{path}:/usr/local/cuda/bin")):
        missing.append("nvcc")
    ask = "import importlib.util as u; print(*(n for n in {} if u.find_spec(n) is None))"
    modules = ("pybind11", "setuptools", "torch")
    done = subprocess.run(
        [sys.executable, "-c", ask.format(modules)], capture_output=True, text=True, check=True
    )
    missing += done.stdout.split()
    if not _has_cutlass():
        missing.append("CUTLASS (QUAVER_CUTLASS_DIR, build/cutlass or the package nvidia-cutlass)")
    return missing


def _has_cutlass():
    given = os.environ.get("QUAVER_CUTLASS_DIR")
    homes = [given] if given else [ROOT / "build/cutlass", sysconfig.get_path("purelib")]
    below = (".", "include", "cutlass_library/source/include")
    return any((Path(h) / b / "cutlass/version.h").is_file() for h in homes for b in below)


def build():
    """Builds in place, the C++ bench too. Returns the PYTHONPATH."""
    env = {**os.environ, "QUAVER_CUDA": "on"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}:/usr/local/cuda/bin"
    setup = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    for command in (setup, ["cmake", "--build", "build/release", "--target", BENCH]):
        done = subprocess.run(command, cwd=ROOT, env=env)
        if done.returncode:
            raise BuildError(f"`{' '.join(command)}` failed with status {done.returncode}")
    return ROOT / "python"


def carried(work):
    """The PYTHONPATH of a carried build. Raises BuildError where there is none for this Python, or
    where it is of other sources than this tree's."""
    if not STAMP.is_file():
        raise BuildError("there is no dist/carried.json: `make carried` makes one with the build")
    stamp = json.loads(STAMP.read_text())
    if stamp["sources"] != digest():
        raise BuildError(f"the carried build is of other sources, commit {stamp['commit']}")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = sorted((ROOT / "dist").glob(f"quaver-*-*{tag}*-*.whl"))
    if wheels:
        site = work / "site"
        shutil.rmtree(site, ignore_errors=True)
        with zipfile.ZipFile(wheels[-1]) as wheel:
            wheel.extractall(site)
        return site
    package = ROOT / "python/quaver"
    module = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.is_file() and (package / "lib/libquaver.so").is_file():
        return ROOT / "python"
    raise BuildError(
        f"no carried build for Python {platform.python_version()}: neither "
        f"dist/quaver-*-*{tag}*-*.whl nor {module}"
    )


def find_bench():
    """The newest bench executable of the build, or None."""
    found = [ROOT / folder / BENCH for folder in BENCHES]
    found = [path for path in found if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def choose(work, mode, missing):
    """(how, PYTHONPATH)."""
    if mode == "carried":
        return "carried", carried(work)
    refused = "it was not asked for"
    if mode == "auto":
        try:
            return "carried", carried(work)
        except BuildError as error:
            refused = str(error)
    if missing:
        raise BuildError(f"cannot build: {', '.join(missing)} is missing; nor carried: {refused}")
    return "built here", build()


def ask(path):
    """What the build at `path` says of itself and of this machine."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"it does not load: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def stamp():
    """`make carried`: copies the C++ bench to dist/ and says what the build there is of."""
    found = [ROOT / folder / BENCH for folder in BENCHES[:2] if (ROOT / folder / BENCH).is_file()]
    if found:
        shutil.copy2(found[0], STAMP.parent / BENCH)
    STAMP.write_text(json.dumps({"commit": commit(), "sources": digest()}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build/report")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--stamp", action="store_true", help="write dist/carried.json")
    args = parser.parse_args()
    if args.stamp:
        return stamp()
    mode, missing = os.environ.get("QUAVER_REPORT_BUILD", "auto"), missing_tools()
    if mode not in ("auto", "build", "carried"):
        sys.exit(f"QUAVER_REPORT_BUILD must be auto, build or carried, got {mode!r}")
    if args.dry_run:
        lacks = ", ".join(missing) or "nothing"
        print(f"QUAVER_REPORT_BUILD={mode}; to build, this machine lacks {lacks}")
        print(f"carried build: {'of these sources' if _is_current() else 'none of these sources'}")
        return None
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        how, path = choose(args.work, mode, missing)
        result = {"how": how, "path": str(path), **ask(path)}
    except BuildError as error:
        sys.exit(f"build: {error}")
    bench = find_bench()
    result |= {"bench_cuda": bench and str(bench), "sources": digest(), "commit": _commit()}
    (args.work / "build.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{how}: {path}, {bench or 'no C++ bench'}")
    if not result["info"]["cuda"]:
        sys.exit("build: it has no CUDA backend")
    return None


def _is_current():
    return STAMP.is_file() and json.loads(STAMP.read_text())["sources"] == digest()


def _commit():
    """This tree's commit; a tree without git has that of the carried build of the same sources."""
    return commit() or (json.loads(STAMP.read_text())["commit"] if _is_current() else None)


if __name__ == "__main__":
    main()
