"""Runs of the loop that take a second, and what they wrote."""

import json
import random
from pathlib import Path

import pytest

from quaver import train

MODEL = {"vocab": 256, "dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 48, "context": 64}


@pytest.fixture
def settings(tmp_path):
    """Settings of a run that takes a second."""
    text = tmp_path / "text.txt"
    text.write_bytes(random.Random(0).randbytes(200) * 50)
    model = tmp_path / "model.json"
    model.write_text(json.dumps(MODEL))

    def make(**changes):
        values = {
            "data": (str(text),),
            "model": str(model),
            "recipe": ("f32",),
            "steps": 8,
            "batch": 2,
            "seq": 16,
            "device": "cpu",
            "out": str(tmp_path / "run"),
            "save_every": 3,
        }
        return train.Settings(**(values | changes))

    return make


def read_metrics(out, name="f32"):
    return [json.loads(line) for line in Path(out, name, "metrics.jsonl").read_text().splitlines()]


def losses(out, name="f32"):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(out, name)]
