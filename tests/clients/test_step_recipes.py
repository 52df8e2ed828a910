"""The recipes of AdamW alone, and MicroAdam, in others' hands: transformers' Trainer and
torch.distributed.checkpoint resume them to the same bits."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small import llama
from test_trainer import losses, trainer
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import quaver as qv
from quaver import recipe as recipes

OPTIMIZERS = (*recipes.step_names(), "microadam")


def build(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 130), torch.nn.GELU(), torch.nn.Linear(130, 70))
    if name == "microadam":
        return model, qv.MicroAdam(model.parameters(), 1e-3)
    return model, qv.AdamW(model.parameters(), 1e-3, recipe=name)


def train(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_distributed_checkpoint_resumes_to_the_same_bits(name, tmp_path):
    whole, part, again = build(name), build(name), build(name)
    train(*whole, 0, 8)
    train(*part, 0, 4)
    saved = dict(zip(("model", "optimizer"), get_state_dict(*part), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path)
    read = dict(zip(("model", "optimizer"), get_state_dict(*again), strict=True))
    dcp.load(read, checkpoint_id=tmp_path)
    set_state_dict(*again, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
    train(*again, 4, 8)
    for p, q in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", recipes.step_names())
def test_the_trainer_resumes_to_the_same_losses(name, tmp_path):
    whole = trainer(llama("bf16"), tmp_path, name)
    whole.train()
    again = trainer(llama("bf16", seed=1), tmp_path / "again", name)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert losses(again) == losses(whole)
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
