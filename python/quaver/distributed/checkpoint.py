"""One file for all ranks, which any number of ranks can continue from.

Rank 0 writes what qv.save writes, with the states of every owner. What differs from rank to rank
(random generators) is kept for each, and comes back where as many ranks continue. A model that is
sharded by FSDP2 has a folder instead, to which every rank writes: fsdp/checkpoint.py. A folder
that is there already stays one.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoint, rng
from ..comm.together import together
from ..comm.transport import Transport
from ..errors import CheckpointError
from ..files import expanded
from ..schema import Each, Maybe, check
from ..tensor import ScaledTensor, is_sharded
from .data_parallel.ddp import DataParallel
from .data_parallel.zero import ZeroAdamW

__all__ = ["load", "save"]

RANKS = "quaver ranks"  # marks our part of the file's `extra`
NOTES = {
    "random": [{"tensors": Each(str), "plain": object}],
    "parallel": Maybe({"mu": Each(float)}),
}


def save(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    parallel: DataParallel | None = None,
    step: int = 0,
    extra=None,
) -> None:
    """qv.save of all ranks together: collective, written by rank 0. With `parallel` its
    auto-scaling is stored too. Raises CheckpointError or OSError as qv.save does, on every rank."""
    path = expanded(path)
    if _is_sharded(model) or path.is_dir():
        from .fsdp import checkpoint as sharded  # a second to import

        return sharded.save(path, model, optimizer, step=step, extra=extra)
    transport, device = _transport(optimizer, parallel), _device(model)
    notes = {
        "random": transport.all_gather_object(_random(), device),
        "parallel": None if parallel is None else parallel.state_dict(),
    }
    whole = _gathered(optimizer, transport) if isinstance(optimizer, ZeroAdamW) else optimizer
    with together(transport, device, CheckpointError):
        if transport.rank == 0:
            checkpoint.save(path, model, whole, step=step, extra={RANKS: notes, "extra": extra})


def load(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    parallel: DataParallel | None = None,
) -> dict:
    """qv.load of what `save` wrote, on any number of ranks, each of which reads `path`; also of
    what qv.save wrote. Collective. Returns {"step": int, "extra": value}.

    Random generators come back to each rank if as many ranks wrote the file; otherwise they stay as
    they are. Raises CheckpointError on every rank, before anything changes on one of them, if one
    of them cannot load.
    """
    path = expanded(path)
    if _is_sharded(model) or path.is_dir():
        from .fsdp import checkpoint as sharded

        return sharded.load(path, model, optimizer)
    transport = _transport(optimizer, parallel)
    notes = None
    with together(transport, _device(model), CheckpointError):
        prepared = checkpoint.prepare(path, model, optimizer)
        generators, state = prepared.generators, prepared.state
        if isinstance(state["extra"], dict) and RANKS in state["extra"]:
            notes = state["extra"][RANKS]
            state = {"step": state["step"], "extra": state["extra"].get("extra")}
            generators = _generators(path, notes, transport)
    prepared.apply()
    if optimizer is not None and generators is not None:
        rng.set_state(*generators)
    if parallel is not None and notes is not None and notes["parallel"] is not None:
        parallel.load_state_dict(notes["parallel"])
    return state


def _generators(path: Path, notes, transport: Transport) -> tuple[dict, dict] | None:
    """This rank's random generators, checked; None where another number of ranks wrote them."""
    try:
        check(notes, NOTES, "ranks")
        mine = notes["random"]
        if len(mine) != transport.size:
            return None
        coded, plain = mine[transport.rank]["tensors"], mine[transport.rank]["plain"]
        tensors = {
            name: torch.frombuffer(
                bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8
            )
            for name, text in coded.items()
        }
        rng.check_state(tensors, plain)
    except ValueError as error:  # of the schema, base64 or the buffer
        raise CheckpointError(f"{path}: {error}") from None
    return tensors, plain


def _is_sharded(model: nn.Module) -> bool:
    return any(is_sharded(p) for p in model.parameters())


def _transport(optimizer, parallel) -> Transport:
    shared = getattr(parallel, "transport", None) or getattr(optimizer, "transport", None)
    return shared or Transport()


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _random() -> dict:
    tensors, plain = rng.get_state()
    coded = {n: base64.b64encode(t.numpy().tobytes()).decode() for n, t in tensors.items()}
    return {"tensors": coded, "plain": plain}


def _tensors(state: dict) -> dict[str, Tensor]:
    """The plain tensors of a parameter's state, by the names that `_rebuild` reads."""
    found = {}
    for key, value in state.items():
        if isinstance(value, ScaledTensor):
            found |= {f"{key}.{part}": tensor for part, tensor in value.parts().items()}
        elif isinstance(value, Tensor):
            found[key] = value
    return found


def _rebuild(found: dict[str, Tensor], described: dict[str, dict]) -> dict:
    state = {key: value for key, value in found.items() if "." not in key}
    for key, description in described.items():
        parts = {n.removeprefix(f"{key}."): t for n, t in found.items() if n.startswith(f"{key}.")}
        state[key] = ScaledTensor.rebuild(parts, description)
    return state


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def _gathered(optimizer: ZeroAdamW, transport: Transport):
    """On rank 0, returns the optimizer with the states of all ranks, those of others on the CPU."""
    if transport.size == 1:
        return optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    mine = {}
    for i, p in enumerate(parameters):
        if optimizer.owns(p):
            state = optimizer.state[p]
            mine[str(i)] = {
                "tensors": {n: [_name(t.dtype), list(t.shape)] for n, t in _tensors(state).items()},
                "scaled": {
                    k: v.description() for k, v in state.items() if isinstance(v, ScaledTensor)
                },
            }
    device = parameters[0].device
    kinds = {
        int(i): kind
        for part in transport.all_gather_object(mine, device)
        for i, kind in part.items()
    }
    states = {}
    for i, p in enumerate(parameters):
        if optimizer.owns(p):
            tensors = _tensors(optimizer.state[p])
            if transport.rank == 0:
                states[p] = optimizer.state[p]
            else:
                for t in tensors.values():
                    transport.send(t, 0)
        elif transport.rank == 0:
            found = {}
            for name, (dtype, shape) in kinds[i]["tensors"].items():
                t = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                transport.receive(t, optimizer.owners[p])
                found[name] = t.cpu()
            states[p] = _rebuild(found, kinds[i]["scaled"])
    whole = object.__new__(type(optimizer))
    whole.__dict__ = {**optimizer.__dict__, "state": states}
    return whole
