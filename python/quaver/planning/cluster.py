"""A model of a training step on a cluster that does not exist: `quaver plan --cluster 1024xh100`.

Nothing of it is measured. What it computes is counted on fake tensors and divided by stated rates;
what it sends and holds follows the counts of small groups of ranks, which `plan` makes. ZeRO deals
out whole tensors, of which no curve is: its plan is of the cluster's own number of ranks.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from .. import recipe as recipes
from ..distributed import ZeroAdamW
from ..errors import UsageError
from ..nn.product import register_product
from ..parallel import Parallel
from .cards import card, link, rates
from .job import Job
from .plan import Plan, plan
from .simulated import simulated
from .sources import source

__all__ = ["Cluster", "model_cluster", "operations"]

KINDS = ("dp", "zero", "fsdp")
MESSAGES, PEAK = itemgetter("messages"), itemgetter("peak")  # of a Plan
RANKS = (2, 4, 8)  # whose plans the model is made of
STEPS = 2  # that a plan takes
MESSAGE = 10e-6  # seconds of a message between two cards before its first byte, a round figure
FP8 = ("quaver.gemm", "quaver.linear", "quaver.linear_backward")
_aten = torch.ops.aten


def _repeated(q: torch.Size, *heads: torch.Size) -> list[tuple[int, ...]]:
    """The shapes of keys and values with a head for each of the queries', which torch's formulas
    ask for before 2.12."""
    return [(shape[0], q[1], *shape[2:]) for shape in heads]


_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, out_shape=None, **o: (
        sdpa_flop(q, *_repeated(q, k, v))
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda dy, q, k, v, *a, out_shape=None, **o: sdpa_backward_flop(dy, q, *_repeated(q, k, v))
    ),
}


@dataclass(frozen=True)
class Cluster:
    """The result of `model_cluster`, of each rank and step.

    ranks, gpu, link: of the cluster. tokens: of all ranks. operations_bf16, operations_fp8: of
    products, a multiplication and an addition each. compute_seconds: those at `utilization` of the
    card's rates, and the optimizer's states, weights and gradients through its memory twice.
    communication: {kind: bytes}. communication_seconds: those at the link's rate, and the messages'
    start. step_seconds: with no overlap; overlapped_seconds: with messages hidden behind
    computation as far as they fit. peak: bytes. fits: on the card.
    """

    ranks: int
    gpu: str
    link: str
    utilization: float
    tokens: int
    operations_bf16: int
    operations_fp8: int
    compute_seconds: float
    communication: dict[str, int]
    communication_seconds: float
    peak: int
    fits: bool

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.communication_seconds

    @property
    def overlapped_seconds(self) -> float:
        return max(self.compute_seconds, self.communication_seconds)


def parsed(text: str) -> tuple[int, str]:
    """The ranks and the card of "1024xh100". Raises UsageError."""
    found = re.fullmatch(r"(\d+)x(\S+)", text)
    if found is None or int(found[1]) < 2:
        raise UsageError(f"plan: cluster wants RANKSxGPU, as 1024xh100, of 2 or more, got {text!r}")
    return int(found[1]), found[2]


def operations(model, recipe, optimizer=None, **options) -> tuple[int, int, Plan]:
    """The operations of a step's products in bf16 and in FP8 on one rank, and its plan. Attention
    counts in full, though a causal kernel may skip half."""
    register_product()  # a counter takes the formulas that exist when it is made
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        alone = plan(model, recipe, optimizer, **options)
    counts = counter.get_flop_counts()["Global"]
    fp8 = sum(n for op, n in counts.items() if str(op) in FP8)
    return (sum(counts.values()) - fp8) // STEPS, fp8 // STEPS, alone


def curve(counts: dict[int, float], ranks: int) -> float:
    """The value at `ranks` of a + b / n + c * n through the three counts {n: value}: what every
    rank has whole, what is cut, and what each gets of every other."""
    points = list(counts)
    table = torch.tensor([[1.0, 1.0 / n, n] for n in points], dtype=torch.float64)
    values = torch.tensor([float(counts[n]) for n in points], dtype=torch.float64)
    wanted = torch.tensor([1.0, 1.0 / ranks, ranks], dtype=torch.float64)
    return max(0.0, (wanted @ torch.linalg.solve(table, values)).item())


def _groups(model, recipe, optimizer, parallel: str, options: dict) -> dict[int, Plan]:
    """The plans of the numbers of ranks that are continued to a cluster's."""
    try:
        return {
            n: plan(model, recipe, optimizer, parallel=f"{parallel}={n}", **options) for n in RANKS
        }
    except UsageError as error:
        others = " or ".join(kind for kind in KINDS if kind != parallel)
        raise UsageError(f"{error}. A cluster's parallel may also be {others}") from None


def _ends(
    parallel: Parallel, model, recipe, optimizer, dtype=torch.bfloat16, **options
) -> list[int]:
    """The ranks of ZeRO that own most bytes and fewest, of which the second sends most."""
    ranks = range(parallel.ranks)
    with simulated(parallel, 0) as world:
        job = Job(source(model, dtype), recipes.get(recipe), optimizer, parallel, world,
                  **{"release": False, "recompute": False, **options})  # fmt: skip
        with job.simulated() as (training, _):
            spread = isinstance(training.optimizer, ZeroAdamW)
            loads = training.optimizer.loads if spread else [0] * len(ranks)
    return [max(ranks, key=loads.__getitem__), min(ranks, key=loads.__getitem__)]


def _spread(
    ranks: int, parallel: str, model, recipe, optimizer, options: dict
) -> tuple[dict[str, int], float, float, int]:
    """What a rank of so many sends by kind, its messages, the bytes of its weights, gradients and
    states, and its peak."""

    def held(p: Plan) -> int:
        return sum(p["peak_by_kind"][kind] for kind in ("weights", "gradients", "states"))

    # A replica in FP8 makes ZeRO of data parallelism, as in optimizers.adamw.
    if parallel == "zero" or (parallel == "dp" and recipes.get(recipe).replica):
        of = {key: options[key] for key in ("dtype", "release", "recompute") if key in options}
        whole = Parallel(parallel, ranks)
        ends = [plan(model, recipe, optimizer, parallel=whole, rank=rank, **options)
                for rank in _ends(whole, model, recipe, optimizer, **of)]  # fmt: skip
        kinds = ends[0]["communication"]
        sent = {kind: max(p["communication"][kind] for p in ends) for kind in kinds}
        return (sent, *(max(map(of, ends)) for of in (MESSAGES, held, PEAK)))
    groups = _groups(model, recipe, optimizer, parallel, options)

    def at(of) -> float:
        return curve({n: of(p) for n, p in groups.items()}, ranks)

    kinds = groups[RANKS[0]]["communication"]
    sent = {kind: round(at(lambda p, kind=kind: p["communication"][kind])) for kind in kinds}
    return sent, at(MESSAGES), at(held), round(at(PEAK))


def model_cluster(
    model,
    recipe,
    optimizer=None,
    *,
    cluster: str,
    parallel: str = "fsdp",
    link_name: str = "ib-ndr",
    utilization: float = 0.5,
    **options,
) -> Cluster:
    """Models a step of `quaver train` on all ranks of a cluster.

    Args:
        model, recipe, optimizer, options: as `plan` takes them; the batch is each rank's own.
        cluster: "1024xh100", ranks and a card with stated rates.
        parallel: "dp", "zero" or "fsdp", over all ranks. ZeRO's ranks differ: each figure is the
            larger one of the rank that owns most and of the one that owns least.
        link_name: what every message goes over, that between hosts where there are several.
        utilization: the share of the stated rate that products reach, above 0 and at most 1.

    Raises UsageError as `plan` does, and for a cluster, kind or share that it does not know.
    """
    ranks, gpu = parsed(cluster)
    if parallel not in KINDS:
        raise UsageError(
            f"plan: a cluster's parallel is dp, zero or fsdp, got {parallel!r}; tensor parallelism "
            "is within a host: plan tp=N"
        )
    if not 0 < utilization <= 1:
        raise UsageError(f"plan: utilization must be above 0 and at most 1, got {utilization}")
    (low, fp8, memory), room, rate = rates(gpu), card(gpu), link(link_name)
    ops_low, ops_fp8, alone = operations(model, recipe, optimizer, **options)
    sent, messages, held, peak = _spread(ranks, parallel, model, recipe, optimizer, options)
    settings = alone["settings"]
    start = MESSAGE * math.ceil(math.log2(ranks))
    return Cluster(
        ranks=ranks, gpu=gpu, link=link_name, utilization=utilization,
        tokens=ranks * settings["batch"] * settings["seq"],
        operations_bf16=ops_low, operations_fp8=ops_fp8,
        compute_seconds=(ops_low / low + ops_fp8 / fp8) / utilization + 2 * held / memory,
        communication=sent,
        communication_seconds=sum(sent.values()) / rate + messages * start,
        peak=peak, fits=peak <= room,
    )  # fmt: skip
