"""A training state as named tensors and a JSON document."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import rng
from ..errors import CheckpointError
from ..placement import like
from ..tensor import ScaledTensor, is_sharded, local
from .document import FORMAT, VERSION


def collect(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, step: int, extra
) -> tuple[dict[str, Tensor], dict]:
    """({name: tensor}, JSON-able document) of a training state; CheckpointError if it has none."""
    tensors, scaled, aliases, seen = {}, {}, {}, {}

    def add(name: str, tensor: Tensor) -> None:
        here = local(tensor)
        if isinstance(here, ScaledTensor):
            scaled[name] = here.description()
        for part, value in entries(name, tensor).items():
            first = seen.setdefault(memory(value), part) if local(value).numel() else part
            if first == part:
                tensors[part] = value
            else:
                aliases[part] = first

    for name, value in model_state(model).items():
        add(name, value)
    described = None if optimizer is None else _collect_optimizer(model, optimizer, add)
    generators, plain = rng.get_state()
    tensors |= {f"rng.{name}": state for name, state in generators.items()}
    return tensors, {
        "format": FORMAT,
        "version": VERSION,
        "scaled": scaled,
        "aliases": aliases,
        "optimizer": described,
        "random": plain,
        "step": _whole(step),
        "extra": _json("extra", extra),
    }


def _whole(step) -> int:
    try:
        step = operator.index(step)
    except TypeError:
        raise CheckpointError(f"step must be a whole number, got {step!r}") from None
    if step < 0:
        raise CheckpointError(f"step must be 0 or more, got {step}")
    return step


def _json(name: str, value):
    """`value` as JSON gives it back; scalars of NumPy and torch become numbers."""

    def number(value):
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            return value.item()
        raise TypeError(f"a {type(value).__name__} is none")

    try:
        return json.loads(json.dumps(value, default=number))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} must hold JSON values: {error}") from None


def entries(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The entries of one tensor in the file."""
    here = local(tensor)
    if not isinstance(here, ScaledTensor):
        return {name: tensor}
    parts = {f"{name}.{part}": value for part, value in here.parts().items()}
    if is_sharded(tensor):
        # Scales are the whole tensor's, except those of rows and blocks.
        parts = {key: like(tensor, part) if part.dim() else part for key, part in parts.items()}
    return parts


def memory(tensor: Tensor) -> tuple:
    """The identity of a tensor's memory: equal for two tensors exactly if they are one."""
    tensor = local(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers themselves, by their names in the file."""
    state = model.state_dict(keep_vars=True)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"model.{key} is a {type(value).__name__}, not a tensor")
    return {f"model.{key}": value for key, value in state.items()}


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the optimizer's parameters, by group: the model's own, where it has them."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [known.get(id(p), f"group{i}.{j}") for j, p in enumerate(group["params"])]
        for i, group in enumerate(optimizer.param_groups)
    ]


def _options(group: dict) -> dict:
    return _json("an optimizer's options", {k: v for k, v in group.items() if k != "params"})


def recipe_of(optimizer: torch.optim.Optimizer) -> str | None:
    """The optimizer's description of how it stores states; None for an optimizer of torch."""
    describe = getattr(optimizer, "describe", None)
    return None if describe is None else describe()


def _collect_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, add: Callable[[str, Tensor], None]
) -> dict:
    names = parameter_names(model, optimizer)
    states = {}
    for group, members in zip(optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], members, strict=True):
            states[name] = {}
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    add(f"optimizer.{name}.{key}", value)
                    # torch keeps Adam's step on the host, whatever the device of the parameter.
                    on_host = value.device.type == "cpu" and parameter.device.type != "cpu"
                    states[name][key] = {"tensor": "host" if on_host else "device"}
                else:
                    states[name][key] = {"value": _json(f"optimizer.{name}.{key}", value)}
    return {
        "class": type(optimizer).__name__,
        "recipe": recipe_of(optimizer),
        "groups": names,
        "options": [_options(group) for group in optimizer.param_groups],
        "states": states,
    }
