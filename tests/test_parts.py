"""FP8 states of FSDP2's shards in state dicts: what gathers or writes them keeps the codes."""

from dataclasses import replace

import pytest
import torch
from rank_pool import run
from torch import nn

import quaver as qv
from quaver.optim.parts import joined, parted

pytestmark = pytest.mark.slow

CODES = {"exp_avg": "e4m3-tensor", "exp_avg_sq": "f16-tensor"}


def recipe():
    return replace(qv.recipe.get("bf16"), plain_moments=True, **CODES)


def trained(seed, steps):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 6))
    fully_shard(model)
    optimizer = qv.AdamW(model.parameters(), 1e-2, recipe=recipe())
    step(model, optimizer, steps)
    return model, optimizer


def step(model, optimizer, steps):
    for i in range(steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(i))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def codes(optimizer):
    """Copies of all that the states are stored as here."""
    found = [s[key].to_local().parts() for s in optimizer.state.values() for key in CODES]
    return [part.clone() for parts in found for part in parts.values()]


def _through_torch(rank, full):
    from torch.distributed.checkpoint import state_dict as api

    model, optimizer = trained(0, 3)
    options = api.StateDictOptions(full_state_dict=full)
    saved = api.get_optimizer_state_dict(model, optimizer, options=options)
    names = {key: tuple(value.shape) for key, value in saved["state"]["0.weight"].items()}
    weights = api.get_model_state_dict(model, options=options)
    other, again = trained(1, 1)
    api.set_model_state_dict(other, weights, options=options)
    api.set_optimizer_state_dict(other, again, saved, options=options)
    first = all(map(torch.equal, codes(optimizer), codes(again)))
    step(model, optimizer, 2)
    step(other, again, 2)
    same = all(map(torch.equal, codes(optimizer), codes(again)))
    weights = zip(model.parameters(), other.parameters(), strict=True)
    return names, first, same, all(torch.equal(a.to_local(), b.to_local()) for a, b in weights)


@pytest.mark.parametrize("full", [True, False])
def test_torchs_state_dicts_keep_the_codes(full):
    for names, *same in run(2, _through_torch, full):
        shape = (24, 16)
        assert names == {"step": (), "exp_avg.qdata": shape, "exp_avg.scale": (),
                         "exp_avg.amax": (), "exp_avg_sq.qdata": shape, "exp_avg_sq.scale": (),
                         "exp_avg_sq.amax": ()}  # fmt: skip
        assert all(same)


def _refusals(rank):
    _, optimizer = trained(0, 1)
    before, found = codes(optimizer), {}
    good = optimizer.state_dict()
    state = good["state"][0]
    decoded = {"step": state["step"]} | {
        key: optimizer.state[optimizer.param_groups[0]["params"][0]][key] * 1.0 for key in CODES
    }
    wholes = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
    changes = {
        "decoded": decoded,
        "whole": wholes,
        "half": {k: v for k, v in state.items() if k != "exp_avg.scale"},
        "other": state | {"exp_avg.qdata": state["exp_avg_sq.qdata"]},
    }
    for name, changed in changes.items():
        try:
            optimizer.load_state_dict({**good, "state": {**good["state"], 0: changed}})
        except ValueError as error:
            found[name] = str(error)
    nested = {key: {p: state[f"{key}.{p}"] for p in ("qdata", "scale", "amax")} for key in CODES}
    optimizer.load_state_dict(
        {**good, "state": {**good["state"], 0: nested | {"step": state["step"]}}}
    )
    return found, all(map(torch.equal, before, codes(optimizer)))


def test_what_holds_no_codes_of_the_shard_is_refused():
    for found, same in run(2, _refusals):
        assert (
            "has exp_avg torch.float32 of shape [24, 16]; recipe bf16 keeps it as"
            in found["decoded"]
        )
        assert "has a whole exp_avg, its parameter is a shard" in found["whole"]
        assert all("has exp_avg a dict; recipe" in found[n] for n in ("half", "other"))
        assert same


def test_states_of_whole_parameters_stay_as_they_are():
    model = nn.Linear(16, 16)
    optimizer = qv.AdamW(model.parameters(), recipe=recipe())
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert parted(state) == state and joined(state, optimizer.slots(model.weight)) == state
