"""Gradient release: each parameter is updated inside backward, and its gradient freed at once.

The idea is LOMO's (arXiv 2306.09782) and torch's tutorial on optimizer steps in backward; here it
holds for every optimizer of this package, with the bits of its ordinary step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import placement
from ..grad import clip_by_norm_
from ..tensor import is_sharded, local
from .base import Optimizer

CLIPS = ("tensor", "lagged", "exact")

_released: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # the parameters with a Release


def is_released(p: Tensor) -> bool:
    """Whether backward updates p."""
    return p in _released


class Release:
    """The handle that `release_gradients` returns; see there. `remove()` undoes it."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, max_norm: float | None, clip: str,
                 accumulate: int):  # fmt: skip
        _check_options(optimizer, max_norm, clip, accumulate)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        _check_model(model, named, optimizer, clip)
        self.model, self.optimizer = model, optimizer
        self.max_norm, self.clip, self.accumulate = max_norm, clip, accumulate
        self._names = {p: n for n, p in named.items()}
        device = next(iter(named.values())).device
        self._norm: Tensor | None = None  # of the step before, float32
        self._square = torch.zeros((), dtype=torch.float64, device=device)  # of this step's norm
        self._left: dict[torch.device, Tensor] = {}
        self._counted: dict[torch.device, Tensor] = {}
        self._done: set[Tensor] = set()
        self._micro, self._task, self._last = 0, None, False
        self._mode: str | None = None  # of `backward` under clip="exact": "measure", "update"
        self._usable: Tensor | None = None
        self._count_from_here()
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._names]
        self._hooks.append(
            optimizer.register_step_pre_hook(lambda *_: self._update_rest(in_step=True))
        )
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._end_step()))
        for p in self._names:
            _released[p] = True

    @property
    def skipped(self) -> int:
        """Updates of single parameters that were left out because a gradient was not finite; the
        optimizer's `skipped` counts the steps with one. Reading it waits for the device."""
        return sum(int(count) for count in self._left.values())

    def remove(self) -> None:
        """Undoes `release_gradients`: backward leaves gradients again, and `step` takes them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for p in self._names:
            _released.pop(p, None)
            reducer = placement.reducer_of(p)
            if reducer is not None and self._mean_arrived in reducer.mean_listeners:
                reducer.mean_listeners.remove(self._mean_arrived)

    def state_dict(self) -> dict:
        """What clip="lagged" remembers between steps: {"norm": float32 0-D, or None}."""
        return {"norm": None if self._norm is None else self._norm.clone()}

    def load_state_dict(self, state: dict) -> None:
        """Loads a `state_dict`. Raises ValueError where it is none."""
        norm = state.get("norm", self)
        if not (norm is None or (isinstance(norm, Tensor) and norm.dim() == 0)):
            raise ValueError(
                f'Release: a state is {{"norm": a 0-D tensor or None}}, got {sorted(state)}'
            )
        self._norm = None if norm is None else norm.to(self._square.device, torch.float32).clone()

    # Backward

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, and under clip="exact" the whole of a step's update: a first backward
        measures the norm and keeps no gradient, a second one updates. With accumulate > 1 the
        gradients of the micro-batches are summed and the last one needs no second backward.

        Raises RuntimeError as backward with a release does.
        """
        if self.clip != "exact":
            return loss.backward()
        if self.accumulate > 1:
            self._mode = "sum"
            try:
                return loss.backward()
            finally:
                self._mode = None
        histories = [b for n, b in self.model.named_buffers() if n.endswith("grad_history")]
        before = [h.clone() for h in histories]
        try:
            self._mode = "measure"
            self._square.zero_()
            loss.backward(retain_graph=True, inputs=list(self._names))
            self._settle_norm()
            for history, kept in zip(histories, before, strict=True):
                history.copy_(kept)  # the second backward is to scale as the first
            self._mode = "update"
            loss.backward()
        finally:
            self._mode = self._usable = None

    def _arrived(self, p: Tensor) -> None:
        """The hook: p's gradient is complete on this rank."""
        try:
            self._enter(p)
        except RuntimeError:
            p.grad = None  # backward is refused whole: `step` is to find nothing of it
            raise
        if self._mode == "measure":
            self._square += placement.grad_norm([p]).double().square().to(self._square.device)
            p.grad = None
        elif self._last and placement.reducer_of(p) is None and self._mode != "sum":
            self._update(p)

    def _mean_arrived(self, p: Tensor) -> None:
        """Data parallelism has replaced p's gradient by the mean."""
        if p not in self._names:
            return
        self._enter(p)
        if not self._last:
            raise RuntimeError(
                f"release_gradients: gradients were averaged in micro-batch {self._micro + 1} of "
                f"{self.accumulate}; wanted the ones before the last inside no_sync()"
            )
        self._update(p)

    def _enter(self, p: Tensor) -> None:
        """Recognises the first gradient of a backward."""
        reducer = placement.reducer_of(p)
        if reducer is not None and self._mean_arrived not in reducer.mean_listeners:
            reducer.mean_listeners.append(self._mean_arrived)
        task = torch._C._current_graph_task_id()
        if task in (-1, self._task):
            return
        if self.clip == "exact" and self._mode is None:
            raise RuntimeError(
                'release_gradients: clip="exact" needs release.backward(loss), got loss.backward()'
            )
        if self.clip == "exact" and reducer is not None:
            raise RuntimeError(
                'release_gradients: clip="exact" cannot wait for the mean over ranks; wanted '
                'clip="tensor" or "lagged" under distributed.ddp'
            )
        if self._micro >= self.accumulate:
            raise RuntimeError(
                f"release_gradients: backward ran more than accumulate={self.accumulate} times "
                "since the last optimizer.step(); call step(), or pass accumulate=n. Activation "
                "checkpointing with use_reentrant=True runs backward inside backward: pass False"
            )
        self._task, self._last = task, self._micro == self.accumulate - 1
        if self._mode != "measure":
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._micro += 1
        if self._last:
            self._update_rest(in_step=False)

    # The update

    @torch.no_grad()
    def _update(self, p: Tensor) -> None:
        """Clips p's gradient, steps p and frees the gradient."""
        if p in self._done:
            raise RuntimeError(
                f"release_gradients: {self._names[p]} got a second gradient after its update; "
                "wanted optimizer.step() between backwards, or accumulate=n for n of them"
            )
        usable = self._usable
        if self.max_norm is not None:
            grads = [local(p.grad)]
            norm = self._norm
            if self.clip != "exact":
                own = placement.grad_norm([p])
                square = torch.where(own.isfinite(), own, 0).double().square()
                self._square += square.to(self._square.device)
                norm = own if self.clip == "tensor" or norm is None else norm
            clip_by_norm_(grads, norm, self.max_norm)
        self.optimizer.step_parameter(p, usable)
        p.grad = None
        self._done.add(p)

    def _update_rest(self, in_step: bool) -> None:
        """Updates by the gradients that are still there: of parameters that only earlier
        micro-batches used, all where the norm is known at the end, and of a step that ends after
        fewer micro-batches than `accumulate`."""
        rest = [p for p in self._names if p.grad is not None]
        if not in_step:  # a mean is taken when it arrives
            rest = [p for p in rest if placement.reducer_of(p) is None]
        if self.clip == "exact" and rest:
            self._square += placement.grad_norm(rest).double().square().to(self._square.device)
            self._settle_norm()
        for p in rest:
            self._update(p)
        if self.clip == "exact":
            self._usable = None

    def _settle_norm(self) -> None:
        self._norm = self._square.sqrt().float()
        self._usable = self._norm.isfinite()
        self._square.zero_()

    def _end_step(self) -> None:
        """The end of `optimizer.step()`."""
        if self.clip == "lagged" and self._done:
            self._norm = self._square.sqrt().float()
        self._square.zero_()
        for device, count in self.optimizer._skipped.items():
            left = count - self._counted.get(device, 0)
            self._left[device] = self._left.get(device, 0) + left
            count.sub_(left).add_(left > 0)  # one for the step
        self._count_from_here()
        self._done.clear()
        self._micro, self._task = 0, None
        self.optimizer.forget_places()

    def _count_from_here(self) -> None:
        self._counted = {d: count.clone() for d, count in self.optimizer._skipped.items()}


def release_gradients(model: nn.Module, optimizer: Optimizer, max_norm: float | None = None,
                      clip: str = "tensor", accumulate: int = 1) -> Release:  # fmt: skip
    """Updates the model's parameters inside backward: as soon as a gradient is complete the
    optimizer steps its parameter and frees it, so that the gradients of a whole model never exist.

        release = qv.release_gradients(model, optimizer, max_norm=1.0, clip="lagged")
        release.backward(loss)   # or loss.backward(), except with clip="exact"
        optimizer.step()         # ends the step: schedulers, hooks, counts

    Without clipping the parameters get the bits of the ordinary step. A parameter with a gradient
    that is not finite is left alone while the others step, and counted in `release.skipped`;
    `optimizer.skipped` counts the steps with such a parameter. An exception in backward leaves the
    parameters whose gradients were complete updated. Weights that several layers share are updated
    once, when all of them have added to the gradient. Nothing waits for the device.

    What it costs: the update cannot overlap backward's kernels on one stream, and the norm of all
    gradients is known only after the first of them is gone, hence the kinds of clipping.

    Args:
        model: whose parameters that require gradients are all in `optimizer`. Under
            `distributed.ddp` (called before or after) the update waits for the mean over ranks.
        optimizer: an optimizer of this package.
        max_norm: >= 0; None does not clip.
        clip: "tensor" clips each parameter's gradient by its own norm. "lagged" scales all of them
            by the norm over the model in the step before (the first step as "tensor"); that norm is
            what `release.state_dict` saves. "exact" takes the norm of this step: `release.backward`
            runs backward twice, which costs about half a step's time and a graph that lives longer;
            where the norm is not finite no parameter changes.
        accumulate: micro-batches in a step. The sum of gradients is kept between the first and the
            last of them, the size of one gradient of the whole model, because no moment of squares
            is exact without it; the last backward frees it piece by piece. Scale the losses as
            usual. A step that ends earlier takes what has come.

    Returns:
        a Release, whose `remove` undoes this.

    Raises:
        TypeError: an optimizer of another package, or of ZeRO.
        ValueError: an unknown clip, a max_norm or accumulate out of range, a parameter that is not
            the optimizer's or has a release already, torch's DistributedDataParallel, shards of
            FSDP2 or tensor parallelism, several devices with a norm over the model.
        RuntimeError: from backward, a second one without `optimizer.step()` between.
    """
    return Release(model, optimizer, max_norm, clip, accumulate)


def _check_options(optimizer, max_norm, clip, accumulate) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"release_gradients: wanted an optimizer of quaver, got {type(optimizer).__name__}"
        )
    if clip not in CLIPS:
        raise ValueError(f"release_gradients: clip must be one of {', '.join(CLIPS)}, got {clip!r}")
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"release_gradients: max_norm must be >= 0 or None, got {max_norm}")
    if clip == "lagged" and max_norm is None:
        raise ValueError('release_gradients: clip="lagged" needs a max_norm, got None')
    if type(accumulate) is not int or accumulate < 1:
        raise ValueError(f"release_gradients: accumulate must be an int >= 1, got {accumulate!r}")


def _check_model(model: nn.Module, named: dict[str, Tensor], optimizer: Optimizer,
                 clip: str) -> None:  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "release_gradients: torch's DistributedDataParallel reduces gradients in buckets "
                "after the update would have taken them; use quaver.distributed.ddp"
            )
    if not named:
        raise ValueError("release_gradients: the model has no parameter that requires a gradient")
    known = _parameters(optimizer)
    for name, p in named.items():
        if p not in known:
            raise ValueError(
                f"release_gradients: {name} is no parameter of the {optimizer.name}; add it, or "
                "freeze it by requires_grad_(False)"
            )
        if p in _released:
            raise ValueError(f"release_gradients: {name} has a release already; remove() it first")
        if is_sharded(p) or placement.shard_of(p) is not None:
            raise ValueError(
                f"release_gradients: {name} is sharded over ranks, whose gradients must be reduced "
                "first; wanted whole parameters"
            )
    devices = {p.device for p in named.values()}
    if clip != "tensor" and len(devices) > 1:
        raise ValueError(
            f'release_gradients: clip="{clip}" needs parameters on one device, got '
            f"{', '.join(sorted(map(str, devices)))}"
        )


def _parameters(optimizer: Optimizer) -> set[Tensor]:
    groups: Iterable[dict] = optimizer.param_groups
    return {p for group in groups for p in group["params"]}
