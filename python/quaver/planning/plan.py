"""Memory of a training step before it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .. import optimizers
from .. import recipe as recipes
from ..errors import UsageError
from ..parallel import Parallel
from .cards import card
from .cards import link as link_rate
from .job import Job
from .search import largest
from .simulated import simulated
from .sources import Source, source

__all__ = ["Plan", "plan"]

LENGTH = 2048
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


class Plan(dict):
    """The result of `plan`: the keys of `memory_report`, and

    peak: the most bytes at once. peak_by_kind: {kind: bytes}, which add up to it: weights, copies
        (casts and FP8 forms of weights), gradients, states, activations, rest. peak_at: the phase
        of the step and the module that reach it.
    parameters: their number, of the whole model. gpu, gpu_bytes, fits: the card, or None.
    communication: {kind: bytes} that this rank sends in a step; kinds are distributed.KINDS.
    messages: the number of messages that it starts in a step.
    link, communication_seconds: the time of these bytes at the link's stated rate, without latency
        and overlap; or None.
    settings: the arguments, by name.
    """

    def __init__(self, values: dict, again: Callable[[int], Plan]):
        super().__init__(values)
        self._again = functools.cache(lambda batch: again(batch)["peak"])

    def largest_batch(self, size: int) -> int:
        """The largest `batch` whose peak is at most `size` bytes, 0 where one sequence takes more;
        the other arguments stay. It plans a few batches. Raises UsageError for a negative size."""
        if size < 0:
            raise UsageError(f"plan: largest_batch wants bytes, got {size}")
        return largest(self._again, size)


def plan(
    model,
    recipe: str | recipes.Recipe,
    optimizer: str | None = None,
    *,
    batch: int = 1,
    seq: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    parallel: str = "",
    rank: int = 0,
    release: bool = False,
    recompute: bool = False,
    gpu: str | None = None,
    link: str | None = None,
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
        parallel: as `quaver train --parallel`: "dp=4", "zero=4", "fsdp=4", "tp=2", "dp=2,tp=2"; the
            plan is that of `rank`, and `batch` is each rank's own.
        release: gradients are released (qv.release_gradients) and not clipped.
        recompute: backward keeps the input of each block alone and runs its forward again.
        gpu: a card's name; a card of 24 GB has 24 x 10^9 bytes.
        link: the name of what joins the cards.

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
    ranks = _parallel(parallel, rank)
    rate = None if link is None else link_rate(link)
    with simulated(ranks, rank) as world:
        job = Job(found, chosen, optimizer, ranks, world, release, recompute)
        report, peak, count = job.run(batch, length)
    settings = {
        "model": found.name, "recipe": chosen.name, "optimizer": optimizer, "batch": batch,
        "seq": length, "dtype": str(dtype).removeprefix("torch."), "parallel": str(ranks),
        "rank": rank, "release": release, "recompute": recompute,
    }  # fmt: skip
    sent = sum(report["communication"].values())
    values = report | {
        "peak": peak.bytes,
        "peak_by_kind": peak.by_kind,
        "peak_at": peak.place,
        "parameters": count,
        "gpu": gpu,
        "gpu_bytes": room,
        "fits": None if room is None else peak.bytes <= room,
        "link": link,
        "communication_seconds": None if rate is None else sent / rate,
        "settings": settings,
    }
    same = {"seq": length, "dtype": dtype, "parallel": parallel, "rank": rank, "release": release,
            "recompute": recompute, "gpu": gpu, "link": link}  # fmt: skip
    return Plan(values, lambda batch: plan(model, recipe, optimizer, batch=batch, **same))


def _recipe(recipe, optimizer: str | None, dtype: torch.dtype) -> recipes.Recipe:
    if dtype not in DTYPES:
        raise UsageError(f"plan: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    try:
        if optimizer is not None:
            optimizers.rate(optimizer)
        return recipes.get(recipe)
    except ValueError as error:
        raise UsageError(f"plan: {error}") from None


def _parallel(text: str, rank: int) -> Parallel:
    try:
        ranks = Parallel.parse(text or None)
    except UsageError as error:
        raise UsageError(f"plan: {error}".replace("--parallel", "parallel")) from None
    if type(rank) is not int or not 0 <= rank < ranks.ranks:
        raise UsageError(f"plan: rank must be an int from 0 to {ranks.ranks - 1}, got {rank!r}")
    return ranks


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
