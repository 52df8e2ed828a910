"""The examples of the README run and learn."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_train_loop_learns_and_saves(tmp_path):
    path = tmp_path / "example.safetensors"
    main = runpy.run_path(str(EXAMPLES / "train_loop.py"))["main"]
    first = main(1, str(path))
    last = main(60, str(path))
    assert last < 0.5 * first
    assert path.stat().st_size > 0


@pytest.mark.slow
def test_compare_tuning_prints_a_row_of_every_method(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "compare_tuning.py"))["main"]
    summary = main(2, tmp_path, width=32)
    assert list(summary["methods"]) == ["full", "lora", "qst"]
    shown = capsys.readouterr().out
    for name, result in summary["methods"].items():
        assert f"{result['trained']:,}" in shown and f"{result['val_loss']:.4f}" in shown
        assert (tmp_path / "manual" / name / "tuned").is_dir()
