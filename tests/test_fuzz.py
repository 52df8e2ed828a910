"""Random calls of every native op (tests/fuzz); `make fuzz` has more, and the sanitizers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz" / "run.py"


def run(*arguments):
    return subprocess.run([sys.executable, FUZZ, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_no_random_call_hurts():
    result = run("--calls", "20000")
    assert result.returncode == 0, result.stdout + result.stderr
    ends = [dict(re.findall(r"'(\w+)': (\d+)", line)) for line in result.stdout.splitlines()]
    count = {name: sum(int(end.get(name, 0)) for end in ends) for name in ("exact", "refused")}
    assert count["exact"] > 6000 and count["refused"] > 4000  # it reaches what it is to test


def test_a_crash_is_reported_with_its_seed(tmp_path):
    code = f"""
import os, sys
sys.argv = [{str(FUZZ)!r}, "--calls", "5", "--seed", "40", "--worker", {str(tmp_path / "at")!r}]
sys.path[:0] = [{str(FUZZ.parent)!r}]
import run
run.run_one = lambda seed, names: os.abort() if seed == 43 else "done"
run.main()
"""
    (tmp_path / "at").write_bytes(b"")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert result.returncode == -6 and int((tmp_path / "at").read_text()) == 43
