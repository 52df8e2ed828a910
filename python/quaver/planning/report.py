"""The peak of a step of a model and an optimizer that exist, for `memory_report(batch=...)`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..optim.release import is_released
from ..tensor import is_sharded
from .job import quiet
from .simulated import HostValues, routed, single_sequences
from .sources import without_storage
from .step import Training, materialise, measure

__all__ = ["step_report"]


def step_report(model: nn.Module, optimizer: torch.optim.Optimizer | None, batch) -> dict:
    """The report of a step on fake copies of both, with "peak", "peak_by_kind" and "peak_at" as in
    a Plan. `batch`: (sequences, tokens of each), or such a tensor of tokens. Nothing of the model
    and the optimizer changes. Raises UsageError."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # half a second to import

    if optimizer is None:
        raise UsageError("memory_report: batch= wants the optimizer too: its states are in a step")
    shape = _shape(batch)
    parameters = list(model.parameters())
    if any(is_sharded(p) for p in parameters):
        raise UsageError(
            "memory_report: batch= wants parameters that are not sharded; plan ranks by "
            "qv.plan(..., parallel=)"
        )
    empty, device = without_storage(model), parameters[0].device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # small tensors of an optimizer stay real
    with fake:
        materialise(empty)
        memo = _states(optimizer)
    memo |= {id(p): other for p, other in zip(parameters, empty.parameters(), strict=True)}
    released = any(is_released(p) for p in parameters)
    copied = _copied(optimizer, memo)
    # An autocast in force here is that of the forward alone.
    off = torch.autocast("cpu", enabled=False)
    with fake, HostValues(), quiet(), single_sequences(), routed(), off:
        training = Training(empty, copied, type(model).__name__, low, released)
        report, peak = measure(training, *shape)
    del report["communication"], report["messages"]
    return report | {
        "peak": peak.bytes,
        "peak_by_kind": peak.by_kind,
        "peak_at": peak.place,
    }


def _shape(batch) -> tuple[int, int]:
    shape = tuple(batch.shape) if isinstance(batch, Tensor) else batch
    shape = shape if isinstance(shape, tuple) else (shape,)
    if len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise UsageError(
            "memory_report: batch must be (sequences, tokens) or a tensor of that shape, got "
            f"{shape}"
        )
    return shape


def _states(optimizer: torch.optim.Optimizer) -> dict[int, object]:
    """{identity of a state's tensor: one without its values}, a memo of deepcopy."""
    values = [v for state in optimizer.state.values() for v in state.values()]
    return {id(v): _empty(v) for v in values if isinstance(v, Tensor)}


def _copied(optimizer: torch.optim.Optimizer, memo: dict[int, object]) -> torch.optim.Optimizer:
    """A copy of the optimizer, for the parameters and states of `memo`."""
    try:
        return copy.deepcopy(optimizer, memo)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"memory_report: a {type(optimizer).__name__} cannot be copied: {error}"
        ) from None


def _empty(t: Tensor) -> Tensor:
    if hasattr(t, "_map"):
        return t._map(_empty)
    return torch.empty(t.shape, dtype=t.dtype)
