"""torch's own sharding over a converted model, on two ranks: what one process finds, or refused."""

from dataclasses import replace

import pytest
import torch
from rank_pool import run
from small import RECIPES, batch, distance, mlp, values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import quaver as qv

pytestmark = pytest.mark.slow

ERRORS = (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError)


def uniform(recipe):
    """torch shards parameters of one dtype: coat's is bf16, so the whole model is."""
    return mlp(recipe, dtype=torch.bfloat16 if recipe == "coat" else torch.float32)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _train(model, rank, make, steps=3):
    optimizer = make(model.parameters())
    for _ in range(steps):
        x, y = batch(seed=rank)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _fsdp2(rank, recipe, make):
    from torch.distributed.fsdp import fully_shard

    model = uniform(recipe)
    try:
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        _train(model, rank, MAKE[make])
        found = {
            n: torch.empty(p.shape).copy_(whole(p.detach())) for n, p in model.named_parameters()
        }
    except ERRORS as error:
        return "refused", f"{type(error).__name__}: {error}"
    return "done", found


def _fsdp1(rank, recipe, make):
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    model = uniform(recipe)
    try:
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        _train(model, rank, MAKE[make])
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            found = {n: torch.empty(p.shape).copy_(p) for n, p in model.state_dict().items()}
    except ERRORS as error:
        return "refused", f"{type(error).__name__}: {error}"
    return "done", found


MAKE = {
    "SGD": lambda p: torch.optim.SGD(p, lr=5.0),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "quaver": lambda p: qv.AdamW(p, lr=1e-2),
}


def alone(recipe, make):
    model = uniform(recipe)
    optimizer = MAKE[make](model.parameters())
    for _ in range(3):
        for seed in range(2):
            x, y = batch(seed=seed)
            (nn.functional.mse_loss(model(x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


NAMED = r"quaver|qv\.|ScaledTensor|Linear:|AdamW|adam_|convert"


def check(results, recipe, make):
    import re

    (kind, one), (other_kind, two) = results
    assert kind == other_kind, results
    if kind == "refused":
        assert recipe != "tensorwise" and re.search(NAMED, one), one
        return
    wanted, start = alone(recipe, make), values(uniform(recipe))
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
        name = key.replace("_fsdp_wrapped_module.", "")
        if name in wanted:
            assert distance(value - start[name], wanted[name] - start[name]) < 0.25, name


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("recipe", RECIPES)
def test_torchs_fsdp2(recipe, make):
    check(run(2, _fsdp2, recipe, make), recipe, make)


@pytest.mark.parametrize("make", ["SGD", "quaver"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_torchs_fsdp1(recipe, make):
    check(run(2, _fsdp1, recipe, make), recipe, make)


STATES = {
    "coat": (lambda: "coat", "recipe coat keeps exp_avg in groups of flat elements, which FSDP1"),
    "one scale": (
        lambda: replace(qv.recipe.get("fp8lm-o2"), plain_moments=True),
        "keeps exp_avg as e4m3-tensor, which FSDP1's flat parameters would cut; use FSDP2",
    ),
    "matrices": (lambda: "subset-norm", "keeps moments of matrices, and FSDP1 flattens them"),
}


def _flattened(rank, states, first, original):
    """The refusal of an optimizer that is made before or after the model is wrapped."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = uniform(None)
    recipe, message = STATES[states][0](), ""
    optimizer = qv.AdamW(model.parameters(), recipe=recipe) if first else None
    model = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
    before = values(model)
    try:
        optimizer = optimizer or qv.AdamW(model.parameters(), recipe=recipe)
        x, y = batch(seed=rank)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    except ValueError as error:
        message = str(error)
    return message, all(torch.equal(v, before[n]) for n, v in values(model).items())


@pytest.mark.parametrize(("first", "original"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("states", STATES)
def test_torchs_fsdp1_is_refused_where_it_would_cut_states(states, first, original):
    for message, same in run(2, _flattened, states, first, original):
        assert STATES[states][1] in message and same


def _tensor_parallel(rank, recipe):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = uniform(recipe)
    try:
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        with torch.no_grad():
            before = whole(model(batch()[0]))
        _train(model, 0, MAKE["AdamW"])
        with torch.no_grad():
            after = whole(model(batch()[0]))
    except ERRORS as error:
        return "refused", f"{type(error).__name__}: {error}"
    return "done", before, after


@pytest.mark.parametrize("recipe", RECIPES)
def test_torchs_tensor_parallelism(recipe):
    import re

    one, two = run(2, _tensor_parallel, recipe)
    assert one[0] == two[0]
    if recipe == "fp8lm-o2":  # on both ranks, before a message
        assert all("parallelize_module: torch cannot scatter the f16" in r[1] for r in (one, two))
        return
    if one[0] == "refused":
        assert re.search(NAMED, one[1]), one[1]
        return
    model = uniform(recipe)
    with torch.no_grad():
        assert distance(one[1], model(batch()[0])) < 0.1
    _train(model, 0, MAKE["AdamW"])
    with torch.no_grad():
        assert distance(one[2], model(batch()[0])) < 0.1
