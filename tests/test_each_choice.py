"""The cases that `--each-choice` selects."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import each_choice

TESTS = """
import pytest

RECIPES = ["a", "b", "c"]

@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.skip)])
def test_three(recipe, rows, cols, device):
    pass

def test_none():
    pass

@pytest.fixture(params=["x", "y"])
def kind(request):
    return request.param

@pytest.mark.parametrize("recipe", RECIPES)
def test_fixture(recipe, kind):
    pass
"""


def test_every_choice_is_in_few_cases():
    lists = [range(5), range(3), range(4)]
    cases = [set(enumerate(case)) for case in itertools.product(*lists)]
    kept = each_choice.covering(cases)
    assert set.union(*(cases[i] for i in kept)) == set.union(*cases)
    assert len(kept) == 5 and 0 in kept


def test_a_case_without_parameters_is_kept():
    assert each_choice.covering([set()]) == {0}


def test_pytest_runs_them(tmp_path):
    (tmp_path / "test_cases.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-v", "--each-choice", "-p", "no:cacheprovider"]
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [*command, tmp_path], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": ":".join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r"::(\w+(?:\[\S+\])?) PASSED", done.stdout)
    assert len(passed) == 4 + 1 + 3, passed
    for value in ("a", "b", "c", "1-1", "1-2", "2-1", "2-2"):
        assert any(re.search(rf"test_three\[.*\b{value}\b", case) for case in passed), value
    assert "12 skipped" in done.stdout and "11 deselected" in done.stdout
