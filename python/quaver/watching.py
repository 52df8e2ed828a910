"""A guard over FP8 layers: cheap statistics of what they cast, and bf16 for a layer in trouble.

watch = qv.watch(model, every=10, fallback="auto")
...
optimizer.step()
watch.step()
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .cast_statistics import MEASURED, STATISTICS, measured, measured_groups
from .nn import MLP, LinearBase, Norm, grouped
from .nn.experts import Experts, weight_names
from .nn.linear import is_converted, smooth
from .tensor import ScaledTensor, is_sharded

__all__ = ["STATE", "STATISTICS", "Watch", "is_watched", "watch"]

STATE = "watch_steps", "watch_modules"  # entries of the model's state_dict
_PLAIN, _CALM, _AMAX = 0, 1, 2  # columns of the state, the last for each of a module's tensors
_NOTHING = -1.0  # stands for a statistic of a tensor that was not seen


def watch(model: nn.Module, *, every: int = 10, fallback: str = "off", flushed: float = 0.25,
          saturated: float = 0.01, kurtosis: float | None = None, amax_jump: float | None = None,
          calm: int = 3, writer=None, group=None) -> Watch:  # fmt: skip
    """Watch the FP8 casts of a converted model; call `.step()` after each `optimizer.step()`.

    The model's bits stay as they are while nothing falls back, and a step between two measured ones
    costs nothing. Measured are the inputs, weights (unless they are sharded) and output gradients
    of linear layers, the outputs of FP8 norms and the products inside FP8 MLPs, in forwards with
    gradients. A stack of experts is one module: of its two products' inputs, weights and output
    gradients the largest amax of an expert counts, and the mean over rows of the rest. Of several
    forwards in a step the largest values count. Ranks step together, share their largest values
    and decide alike.

    Args:
        every: steps from one measured step to the next; the first step is measured.
        fallback: "off" measures alone. "auto" lets a module whose statistics are above a limit
            compute in its input's precision from the next step on (a linear layer in its output's
            dtype, bf16 under autocast), until `calm` measured steps in a row are below all limits.
        flushed: limit of the share of values that are not zero and whose code is. Of a tensor that
            a norm or an MLP made in FP8 it is the share of zero codes.
        saturated: limit of the share of values beyond the format's largest. A layer chooses scales
            that fit, so that only a tensor which a norm or an MLP made in FP8 can be above it: of
            that it is the share of the largest code.
        kurtosis: limit of mean(x^4) / mean(x^2)^2, 3 for normal values, or None for no limit.
        amax_jump: limit of the largest magnitude over that of the measured step before, or None.
        writer: has `add_scalar(tag, value, step)`, as TensorBoard's SummaryWriter has; it gets
            "watch/MODULE.TENSOR/STATISTIC" and "watch/MODULE/plain".
        group: the process group of the ranks that hold the same modules; None is the default one.

    The steps and the modules that fell back are part of `model.state_dict()`, so that a run that
    resumes (watch the model, then load) gives the same bits.

    Raises:
        TypeError: a model that is no nn.Module, or is compiled: graphs run no hooks.
        ValueError: a model without FP8 layers, one that is watched already, a limit or count out of
            range, or "auto" for layers of tensor parallelism.
    """
    return Watch(model, every, fallback, calm, writer, group, {
        "flushed": flushed, "saturated": saturated, "kurtosis": kurtosis, "amax_jump": amax_jump,
    })  # fmt: skip


class _Observed:
    """The handle of a stack's observer, as of a hook."""

    def __init__(self, experts: Experts, observer):
        experts.observer, self.experts = observer, experts

    def remove(self) -> None:
        self.experts.__dict__.pop("observer", None)


@dataclass(frozen=True)
class _Watched:
    """A module, the tensors that it casts, and its row of the state: whether it is plain, its
    measured steps in a row below all limits, and the last amax of each tensor."""

    module: nn.Module
    tensors: tuple[str, ...]
    row: Tensor


class Watch:
    """The result of `watch`. `last`: {module: {tensor: {statistic: value}}} of the last measured
    step; `moved`: {module: whether it is plain now} of those that it moved; `plain`: the names of
    the modules that compute without FP8 now."""

    def __init__(self, model, every, fallback, calm, writer, group, limits):
        _check(model, every, fallback, calm, limits)
        self.model, self.every, self.fallback, self.calm = model, every, fallback, calm
        self.writer, self.group = writer, group
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        self.watched, self._rows = _watched(model, fallback)
        self._steps = torch.zeros((), dtype=torch.int64)
        self.makers = {  # of products: the layer that reads one, and the MLP that makes it
            getattr(w.module, w.module.plan.down): name
            for name, w in self.watched.items()
            if isinstance(w.module, MLP)
        }
        self.last: dict[str, dict[str, dict[str, float]]] = {}
        self.moved: dict[str, bool] = {}
        self._found: dict[tuple[str, str], Tensor] = {}
        self._state_hooks = [
            model.register_state_dict_post_hook(partial(self._save)),  # torch writes to the hook
            model.register_load_state_dict_pre_hook(self._load),
            model.register_forward_pre_hook(self._follow),
        ]
        model._quaver_watched = True
        self._hooks: list = []
        self._apply_state()

    @property
    def steps(self) -> int:
        return int(self._steps)

    @property
    def plain(self) -> list[str]:
        self._follow()
        return [name for name, w in self.watched.items() if w.module.plain]

    def step(self) -> dict | None:
        """Count a training step. After a measured one, returns `last` and moves modules; else None.

        Raises:
            RuntimeError: a measured step in which no watched module ran, say in a compiled graph.
        """
        self._follow()
        measured = self.steps % self.every == 0
        self._steps += 1
        if measured:
            self._judge()
        self._apply_state()
        return self.last if measured else None

    def close(self) -> None:
        """Stop watching: every module computes in FP8 again, and the state_dict has no more
        entries of this."""
        for w in self.watched.values():
            _set_plain(w.module, False)
        for handle in (*self._hooks, *self._state_hooks):
            handle.remove()
        self._hooks, self._state_hooks = [], []
        self.model.__dict__.pop("_quaver_watched", None)

    # Measuring

    def _hook_or_not(self) -> None:
        """Hooks on the modules during a step that is measured, and none else."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        if self.steps % self.every:
            return
        for name, w in self.watched.items():
            if isinstance(w.module, LinearBase):
                hook = w.module.register_forward_hook(self._linear_hook(name))
            elif isinstance(w.module, Norm):
                hook = w.module.register_forward_hook(self._norm_hook(name))
            elif isinstance(w.module, Experts):
                hook = _Observed(w.module, self._experts_hook(name))
            else:
                continue
            self._hooks.append(hook)

    def _linear_hook(self, name: str):
        maker = self.makers.get(self.watched[name].module)

        def hook(module, arguments, output):
            if not torch.is_grad_enabled():  # an evaluation, or a forward that is run again
                return
            x, rule = arguments[0].detach(), module.rule
            if module.channel_amax is not None and not isinstance(x, ScaledTensor):
                x = x / smooth(module.channel_amax).to(x.dtype)  # as it does before it casts
            fine = {"grain": rule.grain, "power_of_two": rule.power_of_two}
            if maker is not None:
                self._measure((maker, "product"), x, rule.input)
            if not isinstance(x, ScaledTensor):  # else the module that made the codes measures them
                self._measure((name, "input"), x, rule.input, module.input_history, **fine)
            weight = module.weight.detach()
            if not is_sharded(weight):
                values = weight.dequantize() if isinstance(weight, ScaledTensor) else weight
                self._measure(
                    (name, "weight"), values, rule.weight, **fine | {"grain": rule.weight_grain}
                )
            if output.requires_grad:
                key, dtype, history = (name, "grad_output"), rule.grad_output, module.grad_history
                output.register_hook(lambda g: self._measure(key, g, dtype, history, **fine))

        return hook

    def _norm_hook(self, name: str):
        def hook(module, arguments, output):
            if torch.is_grad_enabled():
                dtype, history = module.rule.input, module.output_history
                self._measure((name, "output"), output, dtype, history)

        return hook

    def _experts_hook(self, name: str):
        """What a stack calls with the operands of each of its two products, and its result."""

        def hook(rule, tensor, x, weight, y, ends):
            if not torch.is_grad_enabled():
                return
            fine = {"grain": rule.grain, "power_of_two": rule.power_of_two}
            rows = [0, *grouped.read_ends(ends, len(x))]
            self._count((name, f"{tensor}.input"), measured_groups(x, rows, rule.input, **fine))
            if not is_sharded(weight):
                fine_weight = fine | {"grain": rule.weight_grain}
                found = measured_groups(weight.detach().flatten(0, 1), [
                    i * weight.shape[1] for i in range(len(weight) + 1)
                ], rule.weight, **fine_weight)  # fmt: skip
                self._count((name, f"{tensor}.weight"), found)
            if y.requires_grad:
                key = name, f"{tensor}.grad_output"
                y.register_hook(lambda g: self._count(
                    key, measured_groups(g, rows, rule.grad_output, **fine)
                ))  # fmt: skip

        return hook

    @torch.no_grad()
    def _measure(self, key, x: Tensor, dtype: torch.dtype, history: Tensor | None = None,
                 **scales) -> None:  # fmt: skip
        self._count(key, measured(x.detach(), dtype, history, **scales))

    def _count(self, key, found: Tensor) -> None:
        before = self._found.get(key)
        self._found[key] = found if before is None else torch.maximum(before, found)

    # Judging

    def _judge(self) -> None:
        places = [(name, tensor) for name, w in self.watched.items() for tensor in w.tensors]
        device = next((found.device for found in self._found.values()), torch.device("cpu"))
        table = torch.full((len(places), len(MEASURED)), _NOTHING, device=device)
        for row, place in enumerate(places):
            if place in self._found:
                table[row] = self._found[place]
        self._found = {}
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self.group)
        values = table.tolist()
        if all(row[0] == _NOTHING for row in values):
            raise RuntimeError(
                "watch: no watched module ran in this step, where its hooks would see it; call "
                "step() after a forward and backward of the model, which must not be compiled"
            )
        self.last = {}
        for (name, tensor), row in zip(places, values, strict=True):
            if row[0] != _NOTHING:
                self._keep(name, tensor, dict(zip(MEASURED, row, strict=True)))
        before = self._rows[:, _PLAIN].tolist()
        if self.fallback == "auto":
            for name in self.last:
                self._move(name)
        after = zip(self.watched, before, self._rows[:, _PLAIN].tolist(), strict=True)
        self.moved = {name: bool(now) for name, then, now in after if then != now}
        self._write()

    def _keep(self, name: str, tensor: str, found: dict[str, float]) -> None:
        w = self.watched[name]
        place = _AMAX + w.tensors.index(tensor)
        before = w.row[place].item()
        found["amax_jump"] = found["amax"] / before if before > 0 else 1.0
        if math.isfinite(found["amax"]):
            w.row[place] = found["amax"]
        self.last.setdefault(name, {})[tensor] = {key: found[key] for key in STATISTICS}

    def _move(self, name: str) -> None:
        row = self.watched[name].row
        # A value that is not a number is above every limit.
        above = not all(
            found[key] <= limit for found in self.last[name].values()
            for key, limit in self.limits.items()
        )  # fmt: skip
        row[_CALM] = 0 if above else row[_CALM] + 1
        row[_PLAIN] = above or (row[_PLAIN] > 0 and row[_CALM] < self.calm)

    def _write(self) -> None:
        if self.writer is None:
            return
        for name, tensors in self.last.items():
            for tensor, found in tensors.items():
                for key, value in found.items():
                    self.writer.add_scalar(f"watch/{name}.{tensor}/{key}", value, self.steps)
            plain = self.watched[name].row[_PLAIN].item()
            self.writer.add_scalar(f"watch/{name}/plain", plain, self.steps)

    # State

    def _follow(self, *hooked) -> None:
        """Applies a state that something has written, say `qv.load` or torch's checkpoints, which
        write the tensors of a state_dict in place."""
        if (self._rows._version, self._steps._version) != self._applied:
            self._apply_state()

    def _apply_state(self) -> None:
        for w, plain in zip(self.watched.values(), self._rows[:, _PLAIN].tolist(), strict=True):
            _set_plain(w.module, bool(plain))
        self._hook_or_not()
        self._applied = self._rows._version, self._steps._version

    def _save(self, module, state_dict, prefix, metadata) -> None:
        state_dict[prefix + STATE[0]], state_dict[prefix + STATE[1]] = self._steps, self._rows

    def _load(self, module, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        for name, kept in zip(STATE, (self._steps, self._rows), strict=True):
            value = state_dict.pop(prefix + name, None)
            if value is None:
                continue
            if value.shape != kept.shape:
                errors.append(
                    f"watch: the state {name} has the shape {list(value.shape)}, wanted "
                    f"{list(kept.shape)}: of other modules than those that are watched here"
                )
                continue
            kept.copy_(value)


def is_watched(model: nn.Module) -> bool:
    """Whether a Watch of the model adds the entries STATE to its state_dict."""
    return model.__dict__.get("_quaver_watched", False)


def _watched(model: nn.Module, fallback: str) -> tuple[dict[str, _Watched], Tensor]:
    """The modules that cast, and their state."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            found[name] = module, ("input", "weight", "grad_output")
            if fallback == "auto" and not is_converted(module):
                raise ValueError(
                    f'watch: fallback="auto" moves no layer of tensor parallelism, and {name!r} is '
                    f'a {type(module).__name__}; use fallback="off"'
                )
        elif isinstance(module, Norm):
            found[name] = module, ("output",)
        elif isinstance(module, MLP):
            found[name] = module, ("product",)
        elif isinstance(module, Experts):
            found[name] = (
                module,
                tuple(
                    f"{tensor}.{what}"
                    for tensor in weight_names(module)
                    for what in ("input", "weight", "grad_output")
                ),
            )
    if not found:
        raise ValueError("watch: the model has no FP8 layer; call quaver.convert first")
    rows = torch.zeros(len(found), _AMAX + max(len(tensors) for _, tensors in found.values()))
    watched = {
        name: _Watched(*of, row) for (name, of), row in zip(found.items(), rows, strict=True)
    }
    return watched, rows


def _set_plain(module: nn.Module, plain: bool) -> None:
    """The class says False, so that a module which was never moved has no attribute of its own."""
    if plain:
        module.plain = True
    else:
        module.__dict__.pop("plain", None)


def _check(model, every, fallback, calm, limits) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch: model must be an nn.Module, got {type(model).__name__}")
    if "_orig_mod" in model._modules or model._compiled_call_impl is not None:
        raise TypeError("watch: a compiled model runs no hooks; watch the model and leave it eager")
    if is_watched(model):
        raise ValueError("watch: the model is watched already; close() that watch first")
    if fallback not in ("off", "auto"):
        raise ValueError(f'watch: fallback must be "off" or "auto", got {fallback!r}')
    for name, value in (("every", every), ("calm", calm)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"watch: {name} must be an int from 1 on, got {value!r}")
    for name, limit in limits.items():
        if limit is None and name in ("kurtosis", "amax_jump"):
            continue
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 0:
            raise ValueError(f"watch: {name} must be a number from 0 on, got {limit!r}")
