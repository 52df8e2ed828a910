"""The examples of the README run and learn."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_loop.py"


def test_train_loop_learns_and_saves(tmp_path):
    path = tmp_path / "example.safetensors"
    main = runpy.run_path(str(EXAMPLE))["main"]
    first = main(1, str(path))
    last = main(60, str(path))
    assert last < 0.5 * first
    assert path.stat().st_size > 0
