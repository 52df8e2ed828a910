"""A whole training state in one safetensors file: model, optimizer, random generators, step.

Tensors are stored as they are: a ScaledTensor NAME becomes NAME.qdata, NAME.scale and NAME.amax, so
FP8 stays FP8, and tensors that share memory are stored once. Everything else is JSON in the file's
metadata. Nothing is pickled. A file is checked as a whole before the first value of a model
changes.
"""

import json

import torch

from quaver import rng
from quaver.errors import CheckpointError, FileError
from quaver.tensor import ScaledTensor, is_sharded, local
from quaver.tensor_file import read_tensors, write_tensors

__all__ = ["CheckpointError", "load", "save"]

FORMAT = "quaver checkpoint"
VERSION = 2
SUFFIXES = (".qdata", ".scale", ".amax")


def save(path, model, optimizer=None, *, step=0, extra=None):
    """Writes `model`, `optimizer`, the random generators, `step` and `extra` (JSON values) to
    `path`.

    The file appears whole or not at all, and an earlier one at `path` stays until the new one is
    durable. Gradients are not stored: save between steps. Raises CheckpointError naming what cannot
    be stored, and OSError if the file cannot be written.
    """
    try:
        tensors, document = collect(model, optimizer, step, extra)
        sharded = [name for name, tensor in tensors.items() if is_sharded(tensor)]
        if sharded:
            raise CheckpointError(
                f"{sharded[0]} is sharded over ranks: use quaver.distributed.save"
            )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, tensors, document)


def load(path, model, optimizer=None):
    """Restores what `save` wrote, bit for bit, and returns {"step": int, "extra": value}.

    With an `optimizer` its states and options are restored too, and the random generators with them
    (those of CUDA devices that this process does not have are passed over). Raises CheckpointError,
    and leaves everything as it was, if the file is missing, damaged, foreign or does not fit.
    """
    try:
        tensors, document = read_tensors(path, FORMAT, VERSION)
    except FileError as error:
        raise CheckpointError(str(error)) from None
    generators = {n[len("rng.") :]: t for n, t in tensors.items() if n.startswith("rng.")}
    try:
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise CheckpointError("the model is sharded over ranks: use quaver.distributed.load")
        restore = plan(model, optimizer, tensors, document)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    with torch.no_grad():
        for apply in restore:
            apply()
    if optimizer is not None:
        rng.set_state(generators, document["random"])
    return {"step": document["step"], "extra": document["extra"]}


# Saving


def _json(name, value):
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name} must hold JSON values: {error}") from None
    return value


def _parts(name, tensor):
    """The entries of one tensor in the file."""
    here = local(tensor)
    if not isinstance(here, ScaledTensor):
        return {name: tensor}
    parts = {f"{name}.{part}": value for part, value in here.parts().items()}
    if is_sharded(tensor):
        from quaver.placement import like

        # Scales are the whole tensor's, but for those of rows and blocks.
        parts = {key: like(tensor, part) if part.dim() else part for key, part in parts.items()}
    return parts


def _dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _memory(tensor):
    tensor = local(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _model_state(model):
    state = model.state_dict(keep_vars=True)
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"model.{key} is a {type(value).__name__}, not a tensor")
    return {f"model.{key}": value for key, value in state.items()}


def collect(model, optimizer, step, extra):
    """({name: tensor}, JSON-able document) of a training state; CheckpointError if it has none."""
    tensors, scaled, aliases, seen = {}, {}, {}, {}

    def add(name, tensor):
        here = local(tensor)
        if isinstance(here, ScaledTensor):
            scaled[name] = here.description()
        for part, value in _parts(name, tensor).items():
            first = seen.setdefault(_memory(value), part) if local(value).numel() else part
            if first == part:
                tensors[part] = value
            else:
                aliases[part] = first

    for name, value in _model_state(model).items():
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
        "step": step,
        "extra": _json("extra", extra),
    }


def _names(model, optimizer):
    """The names of the optimizer's parameters, by group: the model's own, where it has them."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [known.get(id(p), f"group{i}.{j}") for j, p in enumerate(group["params"])]
        for i, group in enumerate(optimizer.param_groups)
    ]


def _options(group):
    plain = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in group.items()}
    del plain["params"]
    return _json("an optimizer's options", plain)


def _recipe(optimizer):
    """What decides how the optimizer stores its states; None for those of torch."""
    recipe = getattr(optimizer, "recipe", None)
    if recipe is None:
        return None
    master = "" if recipe.bf16_master == "nearest" else f", bf16_master {recipe.bf16_master}"
    return f"{recipe.name} (exp_avg {recipe.exp_avg}, exp_avg_sq {recipe.exp_avg_sq}{master})"


def _collect_optimizer(model, optimizer, add):
    names = _names(model, optimizer)
    states = {}
    for group, members in zip(optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], members, strict=True):
            states[name] = {}
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    add(f"optimizer.{name}.{key}", value)
                    # torch keeps Adam's step on the host, whatever the device of the parameter.
                    on_host = value.device.type == "cpu" and parameter.device.type != "cpu"
                    states[name][key] = {"tensor": "host" if on_host else "device"}
                else:
                    states[name][key] = {"value": _json(f"optimizer.{name}.{key}", value)}
    return {
        "class": type(optimizer).__name__,
        "recipe": _recipe(optimizer),
        "groups": names,
        "options": [_options(group) for group in optimizer.param_groups],
        "states": states,
    }


# Loading: every function below either raises CheckpointError or returns what remains to be done


def plan(model, optimizer, tensors, document):
    """The functions that put `tensors`, named as `collect` named them, into the model and the
    optimizer, if there is one."""
    for alias, name in document["aliases"].items():
        tensors[alias] = tensors[name]
    restore = _plan_model(model, tensors, document["scaled"])
    if optimizer is not None:
        restore += _plan_optimizer(model, optimizer, tensors, document)
    return restore


def _describe(tensors):
    if len(tensors) == 1 and "" in tensors:
        return f"{_dtype(tensors[''])} {list(tensors[''].shape)}"
    inner = ", ".join(f"{key[1:]} {_dtype(t)} {list(t.shape)}" for key, t in tensors.items())
    return f"ScaledTensor({inner})"


def _take(name, values, scaled):
    """Removes the parts of `name` from `values`; {suffix: tensor}."""
    suffixes = SUFFIXES if name in scaled else ("",)
    return {s: values.pop(name + s) for s in suffixes if name + s in values}


def _like(parts):
    # The amax is left out: it is optional metadata.
    return {key: (t.dtype, t.shape) for key, t in parts.items() if key != ".amax"}


def _check(name, target, parts):
    wanted = {key.removeprefix(name): tensor for key, tensor in _parts(name, target).items()}
    if _like(parts) != _like(wanted):
        raise CheckpointError(f"{name} is {_describe(wanted)} here, {_describe(parts)} in the file")


def _copy(target, parts):
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


def _build(parts, scaled, device):
    """A new tensor on `device` from the entries of the file."""
    new = {key: local(tensor).to(device, copy=True) for key, tensor in parts.items()}
    if "" in new:
        built = new[""]
    else:
        built = ScaledTensor.rebuild({key[1:]: part for key, part in new.items()}, scaled)
    codes = next(iter(parts.values()))
    if is_sharded(codes):
        from quaver.placement import like

        built = like(codes, built)
    return built


def _plan_model(model, values, scaled):
    state = _model_state(model)
    found = {name for name in scaled if name.startswith("model.")}
    parts_of_scaled = {name + suffix for name in found for suffix in SUFFIXES}
    found |= {n for n in values if n.startswith("model.") and n not in parts_of_scaled}
    # Types before names: a model of another recipe has other buffers too, but a type mismatch
    # explains more.
    taken = {name: _take(name, values, scaled) for name in state if name in found}
    for name, parts in taken.items():
        _check(name, state[name], parts)
    for problem, keys in (("lacks", set(state) - found), ("has unexpected", found - set(state))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"the file {problem} {min(keys)}{more}")
    restore, first = [], {}
    for name, target in state.items():
        parts = taken[name]
        for suffix, part in zip(parts, _parts(name, target).values(), strict=False):
            before, value = first.setdefault(_memory(part), (name, parts[suffix]))
            if part.numel() and not _same_bytes(value, parts[suffix]):
                raise CheckpointError(f"{before} and {name} are tied here, but not in the file")
        restore.append(lambda target=target, parts=parts: _copy(target, parts))
    return restore


def _same_bytes(a, b):
    a, b = local(a), local(b)
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _plan_optimizer(model, optimizer, values, document):
    saved = document["optimizer"]
    if saved is None:
        raise CheckpointError("the file holds no optimizer")
    for what, here in (("class", type(optimizer).__name__), ("recipe", _recipe(optimizer))):
        if saved[what] != here:
            raise CheckpointError(
                f"the optimizer's {what} is {here} here, {saved[what]} in the file"
            )
    groups = _names(model, optimizer)
    if groups != saved["groups"]:
        raise CheckpointError(f"optimizer groups differ: {_difference(groups, saved['groups'])}")
    restore = []
    for i, group in enumerate(optimizer.param_groups):
        options = saved["options"][i]
        for key, value in options.items():
            # A name chooses how states are stored; numbers and flags are simply taken over.
            if isinstance(value, str) and group.get(key) != value:
                raise CheckpointError(
                    f"optimizer group {i}: {key} is {group.get(key)!r} here, {value!r} in the file"
                )
        restore.append(lambda group=group, options=options: _set_options(group, options))
        owns = getattr(optimizer, "owns", None)  # a sharded optimizer takes its part
        for parameter, name in zip(group["params"], groups[i], strict=True):
            if owns is not None and not owns(parameter):
                continue
            entries = saved["states"][name]
            restore.append(_plan_state(optimizer, parameter, name, entries, values, document))
    return restore


def _difference(here, file):
    here = {name: i for i, names in enumerate(here) for name in names}
    file = {name: i for i, names in enumerate(file) for name in names}
    for name in sorted(here | file):
        if here.get(name) != file.get(name):
            return f"{name} is in group {here.get(name)} here, {file.get(name)} in the file"
    return "the order of the parameters is another"


def _set_options(group, options):
    for key, value in options.items():
        current = group.get(key)
        if isinstance(current, torch.Tensor):
            current.fill_(value)
        else:
            group[key] = tuple(value) if isinstance(current, tuple) else value


def _plan_state(optimizer, parameter, name, entries, values, document):
    """Tensors that exist are written in place, since an optimizer may hold on to them."""
    current = optimizer.state.get(parameter, {})
    state, copies = {}, []
    for key, entry in entries.items():
        full = f"optimizer.{name}.{key}"
        if "value" in entry:
            state[key] = entry["value"]
            continue
        parts = _take(full, values, document["scaled"])
        target = current.get(key)
        if isinstance(target, torch.Tensor):
            _check(full, target, parts)
            copies.append((target, parts))
            state[key] = target
        else:
            device = "cpu" if entry["tensor"] == "host" else parameter.device
            state[key] = _build(parts, document["scaled"].get(full), device)

    def apply():
        for target, parts in copies:
            _copy(target, parts)
        optimizer.state[parameter].clear()
        optimizer.state[parameter].update(state)

    return apply
