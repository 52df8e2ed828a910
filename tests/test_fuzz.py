"""Random calls of every native op (tests/fuzz); `make fuzz` has more, and the sanitizers."""

import importlib.util
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


CRASHES = """
import os, sys
sys.path.insert(0, {folder!r})
import run
run.run_one = lambda seed, names: os.abort() if seed == 43 else "done"
run.main()
"""


def test_a_crash_is_reported_with_its_seed(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("fuzz_run", FUZZ)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    crashes = tmp_path / "crashes.py"
    crashes.write_text(CRASHES.format(folder=str(FUZZ.parent)))
    monkeypatch.setattr(fuzz, "__file__", str(crashes))
    assert fuzz.batch(30, 5) == ("seeds 30 to 34: {'done': 5}", False)
    found = fuzz.batch(40, 5)
    assert found.failed and found.text.endswith("ended with -6 in seed 43")
