"""One file for all ranks, which any number of ranks can continue from.

Rank 0 writes what qv.save writes, with the states of every owner. What differs from rank to rank
(random generators) is kept for each, and comes back where as many ranks continue. A model that is
sharded by FSDP2 has a folder instead, to which every rank writes: fsdp/checkpoint.py. A folder
that is there already stays one.
"""

from __future__ import annotations

import base64
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoint, rng
from ..comm.transport import Transport
from ..errors import FileError
from ..tensor import ScaledTensor, is_sharded
from .data_parallel.ddp import DataParallel
from .data_parallel.zero import ZeroAdamW

__all__ = ["load", "save"]

RANKS = "quaver ranks"  # marks our part of the file's `extra`


def save(
    path,
    model: nn.Module,
    optimizer=None,
    *,
    parallel: DataParallel | None = None,
    step: int = 0,
    extra=None,
) -> None:
    """qv.save of all ranks together: collective, written by rank 0. With `parallel` its
    auto-scaling is stored too. Raises CheckpointError or OSError as qv.save does, on every rank."""
    if _is_sharded(model) or Path(path).is_dir():
        from .fsdp import checkpoint as sharded  # a second to import

        return sharded.save(path, model, optimizer, step=step, extra=extra)
    transport = _transport(optimizer, parallel)
    notes = {
        "random": transport.share(_random(), _device(model)),
        "parallel": None if parallel is None else parallel.state_dict(),
    }
    whole = _gathered(optimizer, transport) if isinstance(optimizer, ZeroAdamW) else optimizer
    error = None
    if transport.rank == 0:
        try:
            checkpoint.save(path, model, whole, step=step, extra={RANKS: notes, "extra": extra})
        except (OSError, FileError) as found:
            error = found
    texts = transport.share(None if error is None else str(error), _device(model))
    if error is not None:
        raise error
    if texts[0] is not None:
        raise checkpoint.CheckpointError(texts[0])


def load(path, model: nn.Module, optimizer=None, *, parallel: DataParallel | None = None) -> dict:
    """qv.load of what `save` wrote, on any number of ranks, each of which reads `path`; also of
    what qv.save wrote. Collective. Returns {"step": int, "extra": value}.

    Random generators come back to each rank if as many ranks wrote the file; otherwise they stay as
    they are. Raises CheckpointError on every rank if one of them cannot load.
    """
    if _is_sharded(model) or Path(path).is_dir():
        from .fsdp import checkpoint as sharded

        return sharded.load(path, model, optimizer)
    transport = _transport(optimizer, parallel)
    before = rng.get_state()
    error = state = None
    try:
        state = checkpoint.load(path, model, optimizer)
    except FileError as found:
        error = found
    texts = transport.share(None if error is None else str(error), _device(model))
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise checkpoint.CheckpointError(f"rank {rank}: {text}")
    if not (isinstance(state["extra"], dict) and RANKS in state["extra"]):
        return state
    notes = state["extra"][RANKS]
    if optimizer is not None:
        if len(notes["random"]) == transport.size:
            _set_random(notes["random"][transport.rank])
        else:
            rng.set_state(*before)
    if parallel is not None and notes["parallel"] is not None:
        parallel.load_state_dict(notes["parallel"])
    return {"step": state["step"], "extra": state["extra"]["extra"]}


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


def _set_random(state: dict) -> None:
    tensors = {
        n: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for n, text in state["tensors"].items()
    }
    rng.set_state(tensors, state["plain"])


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
    """On rank 0 the optimizer with the states of all ranks, those of others on the host."""
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
    kinds = {int(i): kind for part in transport.share(mine, device) for i, kind in part.items()}
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
