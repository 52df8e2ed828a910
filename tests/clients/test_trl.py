"""TRL's SFTTrainer over a converted model, by its own optimizer and by qv.AdamW."""

import runpy
from pathlib import Path

import pytest
import torch
from small import plain

pytest.importorskip("trl", reason="trl is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
EXAMPLE = Path(__file__).parents[2] / "examples/trl_sft.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))["main"]


@pytest.fixture(scope="module")
def wanted(example, tmp_path_factory):
    """The loss of plain torch, in f32."""
    return example(None, folder=str(tmp_path_factory.mktemp("plain")))[0]


@pytest.mark.parametrize(("recipe", "ours"), [("fp8lm-o2", True), ("coat", True), ("coat", False)])
def test_learns_as_plain_torch_and_resumes_bit_for_bit(example, wanted, recipe, ours, tmp_path):
    loss, model = example(recipe, folder=str(tmp_path), ours=ours)
    assert wanted < 2.5 and abs(loss / wanted - 1) < 0.01, "4.13 before the first step"
    middle, folder = str(tmp_path / "checkpoint-20"), str(tmp_path / "again")
    again, resumed = example(recipe, folder=folder, resume=middle, ours=ours)
    assert again == loss
    for (name, a), b in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(plain(a), plain(b[1])), name
