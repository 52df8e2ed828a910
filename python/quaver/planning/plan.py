"""Memory of a training step before it runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import distributed, optimizers
from .. import recipe as recipes
from ..convert import convert
from ..errors import UsageError
from ..schedule import parameter_groups
from .cards import card
from .ledger import Peak
from .sources import Source, source
from .step import Training, materialise, measure, recompute_blocks

__all__ = ["Plan", "build_optimizer", "plan"]

LENGTH = 2048
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
RATE, BETAS = 1e-3, (0.9, 0.95)


class Plan(dict):
    """The result of `plan`: the keys of `memory_report`, and

    peak: the most bytes at once. peak_by_kind: {kind: bytes}, which add up to it: weights, copies
        (casts and FP8 forms of weights), gradients, states, activations, rest. peak_at: the phase
        of the step and the module that reach it.
    parameters: their number. gpu, gpu_bytes, fits: the card, or None.
    settings: the arguments, by name.
    """


def plan(
    model,
    recipe: str | recipes.Recipe,
    optimizer: str | None = None,
    *,
    batch: int = 1,
    seq: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    release: bool = False,
    recompute: bool = False,
    gpu: str | None = None,
) -> Plan:
    """The memory of a training step, found by running it on fake tensors: forward, loss, backward,
    clip and optimizer step, as `quaver train` has them. No bytes of the model are allocated; 7B
    parameters take seconds.

        qv.plan("7b", "coat", "adamw-4bit", release=True, recompute=True, gpu="4090")["peak"]

    Args:
        model: an nn.Module that takes tokens (copied without its bytes, in its own dtypes), a
            Config of quaver.models or of transformers, the folder of a Hugging Face model, a JSON
            file or a name of `quaver.models.PRESETS`.
        recipe: of the model, as qv.convert takes it.
        optimizer: a name of `quaver train --optimizer`; None is qv.AdamW with the recipe's states.
        batch, seq: sequences of a micro-batch, and their tokens; a `seq` of None is 2048, or the
            model's context where that is shorter.
        dtype: of the parameters of a model that is built here. Where some differ from the recipe's
            `autocast`, that is on.
        release: gradients are released (qv.release_gradients) and not clipped.
        recompute: backward keeps the input of each block alone and runs its forward again.
        gpu: a card's name; a card of 24 GB has 24 x 10^9 bytes.

    What ops allocate inside of themselves, the CUDA context (some hundred MB) and the allocator's
    fragments are not counted.

    Raises:
        UsageError: (a ValueError) an unknown name, a folder without a configuration, a model that
            does not run on tokens, a recipe that does not go with the optimizer; one line.
    """
    chosen = _recipe(recipe, optimizer, dtype)
    found = source(model, dtype)
    length = _length(found, batch, seq)
    room = None if gpu is None else card(gpu)
    report, peak, count = _run(found, chosen, optimizer, batch, length, release, recompute)
    settings = {
        "model": found.name, "recipe": chosen.name, "optimizer": optimizer, "batch": batch,
        "seq": length, "dtype": str(dtype).removeprefix("torch."), "release": release,
        "recompute": recompute,
    }  # fmt: skip
    return Plan(
        report,
        peak=peak.bytes,
        peak_by_kind=peak.by_kind,
        peak_at=peak.place,
        parameters=count,
        gpu=gpu,
        gpu_bytes=room,
        fits=None if room is None else peak.bytes <= room,
        settings=settings,
    )


def _recipe(recipe, optimizer: str | None, dtype: torch.dtype) -> recipes.Recipe:
    if dtype not in DTYPES:
        raise UsageError(f"plan: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    try:
        if optimizer is not None:
            optimizers.rate(optimizer)
        return recipes.get(recipe)
    except ValueError as error:
        raise UsageError(f"plan: {error}") from None


def _length(found: Source, batch: int, seq: int | None) -> int:
    """The tokens of a sequence."""
    for name, value in (("batch", batch), ("seq", seq)):
        if value is not None and (type(value) is not int or not 1 <= value < 2**31):
            raise UsageError(f"plan: {name} must be an int from 1 to 2^31 - 1, got {value!r}")
    if seq is None:
        return min(LENGTH, found.context or LENGTH)
    if found.context is not None and seq > found.context:
        raise UsageError(f"plan: seq {seq} exceeds the model's context {found.context}")
    return seq


def _run(
    found: Source,
    chosen: recipes.Recipe,
    optimizer: str | None,
    batch: int,
    length: int,
    release: bool,
    recompute: bool,
) -> tuple[dict, Peak, int]:
    """The report and the peak of a step on fake tensors, and the number of parameters."""
    try:
        model = convert(found.build(), chosen)
    except (TypeError, ValueError) as error:
        raise UsageError(f"plan: {found.name}: {error}") from None
    from torch._subclasses.fake_tensor import FakeTensorMode  # half a second to import

    with FakeTensorMode(), _quiet():
        materialise(model)
        if recompute:
            recompute_blocks(model)
        training = Training(
            model, build_optimizer(found, chosen, optimizer, model), found.name, chosen, release
        )
        report, peak = measure(training, batch, length, fake=True)
        return report, peak, sum(p.numel() for p in model.parameters())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from logging the traceback of an op that is refused, which is raised too."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def build_optimizer(
    found: Source, chosen: recipes.Recipe, name: str | None, model: torch.nn.Module
) -> torch.optim.Optimizer:
    """The optimizer of `quaver train --optimizer`. UsageError where it refuses the model."""
    setting = optimizers.Setting(
        model=model,
        recipe=chosen,
        groups=[g for g in parameter_groups(model) if g["params"]],
        lr=RATE,
        betas=BETAS,
        dim=found.width,
        zero=False,
        sharded=False,
        world=distributed.World(),
    )
    try:
        if name is None:
            return optimizers.adamw(setting, chosen)
        return optimizers.build(name, setting)
    except ValueError as error:
        raise UsageError(f"plan: optimizer {name} with recipe {chosen.name}: {error}") from None
