"""A whole training state in one safetensors file: model, optimizer, random generators, step.

Tensors are stored as they are: a ScaledTensor NAME becomes NAME.qdata, NAME.scale and NAME.amax, so
FP8 stays FP8, and tensors that share memory are stored once. Everything else is JSON in the file's
metadata. Nothing is pickled. A file is checked as a whole before the first value of a model
changes: its description before its tensors are read, so that a file that does not fit costs
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .. import rng
from ..errors import CheckpointError, FileError
from ..files import expanded, opened
from ..schema import SchemaError
from ..tensor import is_sharded
from ..tensor_file import TensorFile, write_tensors
from .document import FORMAT, VERSION, check_document
from .loading import plan
from .saving import collect

__all__ = ["FORMAT", "VERSION", "CheckpointError", "check_document", "collect", "load", "plan",
           "prepare", "save", "step_of"]  # fmt: skip


def save(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    extra=None,
) -> None:
    """Writes `model`, `optimizer`, the random generators, `step` and `extra` (JSON values, or NumPy
    or torch scalars) to `path`, in which a leading ~ is the home folder.

    The file appears whole or not at all, and an earlier one at `path` stays until the new one is
    durable; of several processes that save to one path, the last to end wins. Gradients are not
    stored: save between steps. Raises CheckpointError naming what cannot be stored, and OSError if
    the file cannot be written.
    """
    path = expanded(path)
    try:
        tensors, document = collect(model, optimizer, step, extra)
        sharded = [name for name, tensor in tensors.items() if is_sharded(tensor)]
        if sharded:
            raise CheckpointError(
                f"{sharded[0]} is sharded over ranks: use quaver.distributed.save"
            )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(path, tensors, document)
    except FileError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load(
    path: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict:
    """Restores what `save` wrote, bit for bit, and returns {"step": int, "extra": value}.

    With an `optimizer` its states and options are restored too, and the random generators with them
    (those of CUDA devices that this process does not have are passed over). Raises CheckpointError,
    and leaves everything as it was, if the file is missing, damaged, foreign or does not fit.
    """
    prepared = prepare(path, model, optimizer)
    prepared.apply()
    if optimizer is not None:
        rng.set_state(*prepared.generators)
    return prepared.state


def step_of(path: str | os.PathLike) -> int:
    """The step of what `save` wrote, from its header alone. Raises CheckpointError."""
    try:
        with opened(expanded(path)) as stream:
            file = TensorFile(path, stream, FORMAT, VERSION)
            return check_document(file.document, file.kinds)["step"]
    except SchemaError as error:
        raise CheckpointError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that was read and fits: nothing is left but to `apply` it. `generators` are the
    arguments of rng.set_state, `state` is what `load` returns."""

    restore: list[Callable[[], None]]
    generators: tuple[dict, dict]
    state: dict

    @torch.no_grad()
    def apply(self) -> None:
        """Restores model and optimizer."""
        for apply in self.restore:
            apply()


def prepare(
    path: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Prepared:
    """The checks of `load`, which change nothing yet; the result applies them."""
    path = expanded(path)
    try:
        with opened(path) as stream:
            file = TensorFile(path, stream, FORMAT, VERSION)
            document = check_document(file.document, file.kinds)
            if any(is_sharded(parameter) for parameter in model.parameters()):
                raise CheckpointError(
                    "the model is sharded over ranks: use quaver.distributed.load"
                )
            plan(model, optimizer, file.kinds, document)  # what does not fit need not be read
            tensors = file.read()
        restore = plan(model, optimizer, tensors, document)
        generators = {n[len("rng.") :]: t for n, t in tensors.items() if n.startswith("rng.")}
        if optimizer is not None:
            rng.check_state(generators, document.get("random"))
    except (CheckpointError, SchemaError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    except FileError as error:
        raise CheckpointError(str(error)) from None
    state = {"step": document["step"], "extra": document["extra"]}
    return Prepared(restore, (generators, document.get("random")), state)
