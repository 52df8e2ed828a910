"""Named tensors and a document put back into a training state. Every function either raises
CheckpointError or returns functions that remain to be called, in order.

Tensors on the meta device stand for those of a file that was not read yet: then only names, shapes
and dtypes are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn.cast import HISTORY_STATE
from ..placement import like
from ..tensor import ScaledTensor, is_sharded, local
from .document import SUFFIXES
from .saving import entries, memory, model_state, parameter_names, recipe_of

HISTORIES = ("input_history", "output_history", "grad_history")  # of the modules of quaver.nn

Restore = list[Callable[[], None]]
Parts = dict[str, Tensor]  # of one tensor, by suffix: "" or those of a ScaledTensor


def plan(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    tensors: Mapping[str, Tensor],
    document: dict,
) -> Restore:
    """The function that puts `tensors`, named as by `collect`, into the model and the optimizer."""
    aliases = {alias: tensors[name] for alias, name in document["aliases"].items()}
    values = {**tensors, **aliases}
    restore = _plan_model(model, values, document["scaled"])
    if optimizer is not None:
        restore += _plan_optimizer(model, optimizer, values, document)
    return restore


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _describe(parts: Parts) -> str:
    if len(parts) == 1 and "" in parts:
        return _kind(parts[""])
    return f"ScaledTensor({', '.join(f'{key[1:]} {_kind(t)}' for key, t in parts.items())})"


def _take(name: str, values: dict[str, Tensor], scaled: dict) -> Parts:
    """Removes the parts of `name` from `values`."""
    suffixes = SUFFIXES if name in scaled else ("",)
    return {s: values.pop(name + s) for s in suffixes if name + s in values}


def _like(parts: Parts) -> dict:
    # The amax is left out: it is optional metadata.
    return {key: (t.dtype, t.shape) for key, t in parts.items() if key != ".amax"}


def _check(name: str, target: Tensor, parts: Parts, layout: dict | None) -> None:
    """`parts`, of a ScaledTensor of `layout` if that is given, must be of target's kind."""
    wanted = {key.removeprefix(name): tensor for key, tensor in entries(name, target).items()}
    if _like(parts) != _like(wanted):
        converted = ("" in wanted) != ("" in parts)
        remedy = "; convert the model by the recipe that saved it" if converted else ""
        raise CheckpointError(
            f"{name} is {_describe(wanted)} here, {_describe(parts)} in the file{remedy}"
        )
    if layout is not None:
        here = local(target).description()
        for key, value in here.items():
            if layout[key] != value:
                raise CheckpointError(f"{name}: {key} is {value} here, {layout[key]} in the file")
        _check_amax(name, parts)


def _check_amax(name: str, parts: Parts) -> None:
    amax, scale = parts.get(".amax"), parts[".scale"]
    if amax is not None and (amax.dtype, amax.shape) != (scale.dtype, scale.shape):
        raise CheckpointError(f"{name}.amax is {_kind(amax)}, its scale {_kind(scale)}")


def _copy(target: Tensor, parts: Parts) -> None:
    whole, target = target, local(target)
    parts = {key: local(tensor) for key, tensor in parts.items()}
    if not isinstance(target, ScaledTensor):
        target.copy_(parts[""])
        return
    target.qdata.copy_(parts[".qdata"])
    target.scale.copy_(parts[".scale"])
    amax = parts.get(".amax")
    if amax is not None and target.amax is not None:
        target.amax.copy_(amax)
    else:
        target.amax = None if amax is None else amax.to(target.qdata.device, copy=True)
    torch.autograd.graph.increment_version(whole)
    target.refresh_copies()


def _build(name: str, parts: Parts, layout: dict | None, device: torch.device | str) -> Tensor:
    """A new tensor on `device` from the entries of the file."""
    codes = next(iter(parts.values()))
    if codes.is_meta:
        device = "meta"
    new = {key[1:]: local(tensor).to(device, copy=True) for key, tensor in parts.items()}
    if layout is None:
        built = new[""]
    else:
        _check_amax(name, parts)
        try:
            built = ScaledTensor.rebuild(new, layout)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{name}: {error}") from None
    if is_sharded(codes):
        built = like(codes, built)
    return built


# The model


def _plan_model(model: nn.Module, values: dict[str, Tensor], scaled: dict) -> Restore:
    state = model_state(model)
    found = {name for name in scaled if name.startswith("model.")}
    parts_of_scaled = {name + suffix for name in found for suffix in SUFFIXES}
    found |= {n for n in values if n.startswith("model.") and n not in parts_of_scaled}
    # Types before names: a model of another recipe has other buffers too, but a type mismatch
    # explains more.
    taken = {name: _take(name, values, scaled) for name in state if name in found}
    for name, parts in taken.items():
        _check(name, state[name], parts, scaled.get(name))
        _check_history(name, parts)
    for problem, keys in (("lacks", set(state) - found), ("has unexpected", found - set(state))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"the file {problem} {min(keys)}{more}")
    _check_ties(state, taken)
    return [lambda t=target, p=taken[name]: _copy(t, p) for name, target in state.items()]


def _check_ties(state: dict[str, Tensor], taken: dict[str, Parts]) -> None:
    first = {}
    for name, target in state.items():
        parts = taken[name]
        for suffix, part in zip(parts, entries(name, target).values(), strict=False):
            before, value = first.setdefault(memory(part), (name, parts[suffix]))
            if part.numel() and not _same_bytes(value, parts[suffix]):
                raise CheckpointError(f"{before} and {name} are tied here, but not in the file")


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a is b or a.is_meta:
        return True
    a, b = local(a), local(b)
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _check_history(name: str, parts: Parts) -> None:
    """An amax history must be one that casts can leave (scale.h); its first value is a count."""
    history = local(parts.get("", torch.empty(0, device="meta")))
    is_one = name.rpartition(".")[2] in HISTORIES and history.shape == (HISTORY_STATE,)
    if not is_one or history.is_meta:
        return
    count, amaxes = history[0].item(), history[1:]
    if not (0 <= count < 2 * len(amaxes) and count == int(count)):
        raise CheckpointError(f"{name} counts {count} amaxes, wanted 0 to {2 * len(amaxes) - 1}")
    if not bool(((amaxes >= 0) & amaxes.isfinite()).all()):
        raise CheckpointError(f"{name} holds an amax that is negative or not finite")


# The optimizer


def _plan_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, values: dict[str, Tensor], document: dict
) -> Restore:
    saved = document["optimizer"]
    if saved is None:
        raise CheckpointError("the file holds no optimizer")
    for what, here in (("class", type(optimizer).__name__), ("recipe", recipe_of(optimizer))):
        if saved[what] != here:
            raise CheckpointError(
                f"the optimizer's {what} is {here} here, {saved[what]} in the file; build it as it "
                "was, or load the model alone"
            )
    groups = parameter_names(model, optimizer)
    if groups != saved["groups"]:
        raise CheckpointError(f"optimizer groups differ: {_difference(groups, saved['groups'])}")
    restore = []
    for i, group in enumerate(optimizer.param_groups):
        options = saved["options"][i]
        for key, value in options.items():
            _check_option(f"optimizer group {i}: {key}", key, value, group)
        restore.append(lambda group=group, options=options: _set_options(group, options))
        owns = getattr(optimizer, "owns", None)  # a sharded optimizer takes its part
        for parameter, name in zip(group["params"], groups[i], strict=True):
            if owns is None or owns(parameter):
                states = saved["states"][name]
                restore.append(_plan_state(optimizer, parameter, name, states, values, document))
    return restore


def _difference(here: list[list[str]], file: list[list[str]]) -> str:
    here = {name: i for i, names in enumerate(here) for name in names}
    file = {name: i for i, names in enumerate(file) for name in names}
    for name in sorted(here | file):
        if here.get(name) != file.get(name):
            return f"{name} is in group {here.get(name)} here, {file.get(name)} in the file"
    return "the order of the parameters is another"


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_option(where: str, key: str, value, group: dict) -> None:
    """A name chooses how states are stored and must be the same; numbers, pairs of numbers and
    flags are taken over where they are of the kind that is here."""
    current = group.get(key)
    if isinstance(current, Tensor):
        current = current.item()
    if key == "params":
        raise CheckpointError(f"{where} is no option")
    if isinstance(value, str) or isinstance(current, str):
        fits = value == current
    elif isinstance(current, (tuple, list)):
        numbers = isinstance(value, list) and all(map(_is_number, value))
        fits = numbers and len(value) == len(current)
    elif _is_number(current):
        fits = _is_number(value)
    else:
        fits = key not in group or value is None or isinstance(value, (bool, int, float))
    if not fits:
        raise CheckpointError(f"{where} is {current!r} here, {value!r} in the file")


def _set_options(group: dict, options: dict) -> None:
    for key, value in options.items():
        current = group.get(key)
        if isinstance(current, Tensor):
            current.fill_(value)
        else:
            group[key] = tuple(value) if isinstance(current, tuple) else value


def _check_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, name: str, state: dict
) -> None:
    """Raises CheckpointError where an optimizer of quaver refuses a new state of `parameter`."""
    check_saved = getattr(optimizer, "_check_saved", None)
    if check_saved is None or not state or is_sharded(parameter):
        return
    try:
        check_saved(name, state, parameter)
    except ValueError as error:
        raise CheckpointError(f"optimizer.{name}: {error}") from None


def _plan_state(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    name: str,
    states: dict,
    values: dict[str, Tensor],
    document: dict,
) -> Callable[[], None]:
    """Tensors that exist are written in place, since an optimizer may hold on to them."""
    current = optimizer.state.get(parameter, {})
    if current and states and current.keys() != states.keys():
        here, there = (", ".join(sorted(keys)) for keys in (current, states))
        raise CheckpointError(f"optimizer.{name} has {here} here, {there} in the file")
    state, copies = {}, []
    for key, entry in states.items():
        full, target = f"optimizer.{name}.{key}", current.get(key)
        layout = document["scaled"].get(full)
        if "value" in entry:
            if isinstance(target, Tensor):
                raise CheckpointError(f"{full} is {_kind(target)} here, a value in the file")
            state[key] = entry["value"]
            continue
        parts = _take(full, values, document["scaled"])
        if isinstance(target, Tensor):
            _check(full, target, parts, layout)
            copies.append((target, parts))
            state[key] = target
        else:
            device = "cpu" if entry["tensor"] == "host" else parameter.device
            state[key] = _build(full, parts, layout, device)
    _check_state(optimizer, parameter, name, state)

    def apply() -> None:
        for target, parts in copies:
            _copy(target, parts)
        optimizer.state[parameter].clear()
        optimizer.state[parameter].update(state)

    return apply
