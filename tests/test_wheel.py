"""The wheel installs and trains where there is no compiler and no source tree."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(*command, **options):
    command = [str(part) for part in command]
    done = subprocess.run(command, text=True, capture_output=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """With a module for this Python, and one for a further Python that has the same headers."""
    folder = tmp_path_factory.mktemp("wheel")
    further = folder / "python3.99"
    include = sysconfig.get_path("include")
    further.write_text(f'#!/bin/sh\necho "{include};.cpython-399-x86_64-linux-gnu.so"\n')
    further.chmod(0o755)
    pip = (sys.executable, "-m", "pip")
    env = {**os.environ, "QUAVER_PYTHONS": str(further)}
    run(*pip, "wheel", ROOT, "--no-build-isolation", "--no-deps", "-w", folder, env=env)
    (path,) = folder.glob("quaver-*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "quaver/lib/libquaver.so" in names
    assert sum(name.startswith("quaver/_C.") for name in names) == 2
    sources = {str(p.relative_to(ROOT / "python")) for p in (ROOT / "python").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert {Path(name).suffix for name in names if name.startswith("quaver/")} == {".py", ".so"}
    python, abi, platform = wheel.stem.split("-")[2:]
    assert python == abi == f"cp{sys.version_info.major}{sys.version_info.minor}.cp399"
    assert platform.startswith("linux_")


def link_packages(destination):
    """Links what runs these tests, except quaver, instead of downloading torch once more."""
    own = ("quaver", "__editable__", "pip", "_distutils", "distutils")
    for folder in (Path(entry) for entry in sys.path if entry.endswith("-packages")):
        for package in folder.iterdir():
            link = destination / package.name
            if not package.name.startswith(own) and not link.exists():
                link.symlink_to(package)


def test_wheel_trains_in_a_clean_environment(wheel, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    link_packages(site_packages)
    env = {"PATH": str(venv / "bin"), "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    for tool in ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja", "make"):
        assert shutil.which(tool, path=env["PATH"]) is None
    # Without an index, pip also proves that what the wheel depends on is really there.
    run(venv / "bin/pip", "install", "--no-index", wheel, env=env, cwd=tmp_path)
    where = run(
        *(venv / "bin/python", "-c", "import quaver; print(quaver.__file__)"),
        **{"env": env, "cwd": tmp_path},
    )
    assert Path(where.strip()).is_relative_to(venv)
    run(
        *(venv / "bin/quaver", "train", "--data", "stdlib", "--model", "tiny"),
        *("--recipe", "bf16,fp8lm-o2", "--steps", "3", "--batch", "2", "--seq", "32"),
        *("--out", "out"),
        **{"env": env, "cwd": tmp_path},
    )
    recipes = json.loads((tmp_path / "out/summary.json").read_text())["recipes"]
    assert {name: recipe["steps"] for name, recipe in recipes.items()} == {"bf16": 3, "fp8lm-o2": 3}
    # Nearly untrained, so near the uniform guess, and the recipes have not parted yet.
    losses = [recipe["final_loss"] for recipe in recipes.values()]
    assert all(0 < loss < 12 for loss in losses)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
