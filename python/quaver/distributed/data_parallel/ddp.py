"""Data parallelism: every rank has the model and a part of the batch; backward averages gradients.

Hooks on the parameters fill buckets in the order in which backward finishes them. A full bucket
starts its first message; each later full bucket advances all running ones by one message, which
overlaps communication with backward. All ranks start all messages in the same order, whatever their
timing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import placement
from ...comm.transport import Transport, compare
from ...nn.cast import nan_unless_finite
from ...nn.linear import LinearBase
from ...nn.rows import chosen_rows
from ...rows import Rows
from ...tensor import ScaledTensor, plain_tensors
from ..replicas import broadcast_values, describe, histories, stack_histories, unstack_histories_
from .all_reduce import ALGORITHMS, FP8, Protocol, Reduced, reduce_to_owners, ring, two_shot, upload
from .auto_scale import AutoScale, AutoScaleRule

__all__ = ["DataParallel", "ddp"]


@dataclass(eq=False)
class _Bucket:
    names: list[str]
    parameters: list[nn.Parameter]
    dtype: torch.dtype  # of the messages
    decode: bool  # FP8 means become plain gradients
    owners: list[int] | None = None
    auto_scale: AutoScale | None = None
    waiting: set[str] = field(default_factory=set)  # names without a gradient so far


class _Pipeline:
    """The running protocols. `advance` starts the next message of each, the oldest first."""

    def __init__(self):
        self._active: list[list] = []

    def start(self, protocol: Protocol, done) -> None:
        self._active.append([protocol, next(protocol), done])

    def advance(self) -> None:
        for entry in list(self._active):
            protocol, pending, done = entry
            try:
                entry[1] = protocol.send(pending.wait())
            except StopIteration as end:
                self._active.remove(entry)
                done(end.value)

    def finish(self) -> None:
        while self._active:
            self.advance()

    def clear(self) -> None:
        self._active.clear()


class DataParallel:
    """The handle that `ddp` returns. The model keeps its class, its names and its state_dict.

    Attributes:
        transport: `transport.traffic` counts the bytes that this rank sent, by kind.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        group: dist.ProcessGroup | None,
        algorithm: str,
        dtype: torch.dtype,
        bucket_bytes: int,
        auto_scale: AutoScaleRule | None,
        fp8_gradients: bool,
    ):
        if algorithm not in ALGORITHMS:
            raise ValueError(f"ddp: algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
        if dtype not in FP8:
            raise ValueError(f"ddp: dtype must be float8_e4m3fn or float8_e5m2, got {dtype}")
        if bucket_bytes < 1:
            raise ValueError(f"ddp: bucket_bytes must be positive, got {bucket_bytes}")
        owners = getattr(optimizer, "gradient_owners", None)
        if owners is not None and algorithm != "two_shot":
            raise ValueError(f"ddp: gradients go to their owners by two_shot, not by {algorithm}")
        shared = getattr(optimizer, "transport", None)
        self.transport = Transport(group) if shared is None else shared
        self.model = model
        self.algorithm, self.dtype, self.fp8_gradients = algorithm, dtype, fp8_gradients
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("ddp: the model has no parameter that requires a gradient")
        self._check_devices(named)
        self._histories = histories(model)
        self._buckets = self._make_buckets(named, owners, bucket_bytes, auto_scale)
        self._agree(named, optimizer, bucket_bytes)
        broadcast_values([*model.parameters(), *model.buffers()], self.transport)
        self._bucket_of = {n: b for b in self._buckets for n in b.names}
        self._names = list(named)
        self._sync, self._running, self._next = True, False, 0
        self._pipeline = _Pipeline()
        self._device = next(iter(named.values())).device
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device, priority=-1) if on_gpu else None
        self._hooks = []
        # Each is called with a parameter once its `.grad` is the mean over ranks.
        self.mean_listeners: list[Callable[[Tensor], None]] = []
        if self.transport.size > 1:
            for name, p in named.items():
                hook = p.register_post_accumulate_grad_hook(lambda p, n=name: self._arrived(n))
                self._hooks.append(hook)
                placement.set_reducer(p, self)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside accumulate gradients on this rank; the next one outside averages them.
        For all micro-batches of a step except the last."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def remove(self) -> None:
        """Undoes `ddp`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.mean_listeners = [], []
        for p in (p for b in self._buckets for p in b.parameters):
            placement.set_reducer(p, None)

    def state_dict(self) -> dict:
        """Plain numbers: mu by the parameter's name; empty except for `ring`."""
        mu = {}
        for b in self._buckets:
            if b.auto_scale is not None:
                mu |= dict(zip(b.names, b.auto_scale.mu.tolist(), strict=True))
        return {"mu": mu}

    def load_state_dict(self, state: dict) -> None:
        """Loads mu of the names that exist here from a `state_dict`, within the rule's range."""
        for b in self._buckets:
            if b.auto_scale is None:
                continue
            mu = b.auto_scale.mu
            for i, name in enumerate(b.names):
                if name in state["mu"]:
                    mu[i] = state["mu"][name]
            mu.clamp_(b.auto_scale.least, b.auto_scale.rule.most)

    def _check_devices(self, named: dict[str, nn.Parameter]) -> None:
        first, p0 = next(iter(named.items()))
        for name, p in named.items():
            if p.device != p0.device:
                raise ValueError(
                    f"ddp: parameters must be on one device: {first} is on {p0.device}, {name} on "
                    f"{p.device}"
                )
        if self.transport.backend == "nccl" and p0.device.type != "cuda":
            raise ValueError(
                f"ddp: an nccl group needs parameters on cuda, {first} is on {p0.device}"
            )

    def _make_buckets(self, named, owners, bucket_bytes, auto_scale) -> list[_Bucket]:
        """Parameters from the last to the first, as backward finishes them, each with its own kind
        of message."""
        kinds = self._kinds()
        open_buckets: dict[tuple, _Bucket] = {}
        sizes: dict[tuple, int] = {}
        buckets = []
        for name, p in reversed(named.items()):
            kind = kinds.get(p) or (p.dtype, False)
            size = p.numel() * kind[0].itemsize
            if kind not in open_buckets or sizes[kind] + size > bucket_bytes:
                sizes[kind] = 0
                open_buckets[kind] = _Bucket([], [], *kind, None if owners is None else [])
                buckets.append(open_buckets[kind])
            bucket = open_buckets[kind]
            bucket.names.append(name)
            bucket.parameters.append(p)
            if owners is not None:
                bucket.owners.append(owners[p])
            sizes[kind] += size
        # A bucket starts once its last gradient is there.
        place = {name: i for i, name in enumerate(reversed(named))}
        buckets.sort(key=lambda b: place[b.names[-1]])
        for b in buckets:
            b.waiting = set(b.names)
            if self.algorithm == "ring" and b.dtype in FP8:
                numels = [p.numel() for p in b.parameters]
                rule = auto_scale or AutoScaleRule()
                b.auto_scale = AutoScale(numels, self.transport.size, rule, b.parameters[0].device)
        return buckets

    def _kinds(self) -> dict[nn.Parameter, tuple[torch.dtype, bool]]:
        """{weight: (dtype, decode)} of the gradients that are sent in FP8. `decode`: backward
        leaves a plain gradient, so the mean becomes one too."""
        kinds = {}
        for module in self.model.modules():
            if isinstance(module, LinearBase):
                low = isinstance(module.weight, ScaledTensor) or module.rule.weight_grad == "e4m3"
                if low or self.fp8_gradients:
                    kinds[module.weight] = (self.dtype, not low)
        return kinds

    def _agree(self, named, optimizer, bucket_bytes) -> None:
        """Compares the ranks' messages: a difference is an error now, not a hang later."""
        mine = {
            "ddp": f"{self.algorithm} in {self.dtype}, buckets of {bucket_bytes} bytes, "
            f"fp8_gradients={self.fp8_gradients}",
            "optimizer": f"{type(optimizer).__name__} {getattr(optimizer, 'recipe', None)}",
            **describe(named, self.model),
        }
        compare("ddp", self.transport.all_gather_object(mine, next(iter(named.values())).device))

    def _arrived(self, name: str) -> None:
        """A gradient is complete."""
        if not self._sync:
            return
        bucket = self._bucket_of[name]
        if not self._running:
            self._running = True
            self._next = 0
            for b in self._buckets:
                b.waiting = set(b.names)
            self._pipeline.clear()  # of a backward that raised
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if name not in bucket.waiting:
            raise RuntimeError(f"ddp: the gradient of {name} arrived twice in one backward")
        bucket.waiting.remove(name)
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting:
            self._launch(self._buckets[self._next])

    @contextlib.contextmanager
    def _beside(self):
        """The stream of messages and their kernels, which runs beside backward's."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _launch(self, bucket: _Bucket) -> None:
        self._next += 1
        with torch.no_grad(), self._beside():
            self._pipeline.advance()
            self._pipeline.start(
                self._protocol(bucket), lambda reduced: self._take(bucket, reduced)
            )

    def _protocol(self, b: _Bucket) -> Protocol:
        grads = [self._gradient(n, p) for n, p in zip(b.names, b.parameters, strict=True)]
        if self._stream is not None:
            # Backward's stream allocated them, and the mean replaces them before this stream has
            # read them: without a record the allocator would hand their memory to backward again.
            for part in (part for grad in grads for part in plain_tensors(grad)):
                part.record_stream(self._stream)
        if b.owners is not None:
            result = torch.float32 if b.decode else None
            return reduce_to_owners(grads, b.dtype, self.transport, b.owners, result)
        if b.auto_scale is not None:
            return ring(grads, b.dtype, self.transport, b.auto_scale.mu)
        return two_shot(grads, b.dtype, self.transport)

    @staticmethod
    def _gradient(name: str, p: nn.Parameter) -> Tensor:
        """p's gradient, or the zeros of a parameter that this rank did not use."""
        grad, index = p.grad, chosen_rows(p)
        if grad is None:
            shape = p.shape if index is None else (index.numel(), *p.shape[1:])
            return torch.zeros(shape, dtype=p.dtype, device=p.device)
        if isinstance(grad, Rows):
            return grad.values
        if grad.is_sparse:
            raise RuntimeError(f"ddp: the gradient of {name} is sparse, which is not supported")
        return grad

    def _take(self, b: _Bucket, reduced: Reduced) -> None:
        for p, mean in zip(b.parameters, reduced.tensors, strict=True):
            mean = _plain(mean, p.dtype) if b.decode and mean is not None else mean
            index = p.grad.index if isinstance(p.grad, Rows) else None
            index = chosen_rows(p) if p.grad is None else index
            some = mean is not None and index is not None
            p.grad = Rows(mean, index, p.shape[0]) if some else mean
        if b.auto_scale is not None:
            amax = torch.stack([t.amax for t in reduced.tensors])
            b.auto_scale.update(reduced.saturated, amax.isfinite())
        # Whether some rank used the others is known at the end.
        self._notify(p for n, p in zip(b.names, b.parameters, strict=True) if n not in b.waiting)

    def _notify(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            for listener in self.mean_listeners if p.grad is not None else ():
                listener(p)

    def _finish(self) -> None:
        """The end of backward: finishes all buckets, and drops gradients that no rank has."""
        self._running = False
        used = [
            float(name not in b.waiting or p.grad is not None)  # of an earlier micro-batch
            for b in self._buckets
            for name, p in zip(b.names, b.parameters, strict=True)
        ]
        while self._next < len(self._buckets):
            self._launch(self._buckets[self._next])
        with torch.no_grad(), self._beside():
            self._pipeline.finish()
            self._share_usage(used)
            for b in self._buckets:
                pairs = zip(b.names, b.parameters, strict=True)
                self._notify(p for n, p in pairs if n in b.waiting)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _share_usage(self, used: list[float]) -> None:
        """One small maximum a step: which parameters some rank used, and the amax histories. With
        equal histories ranks scale as one process with the whole batch would, and a checkpoint
        needs one copy."""
        values = upload(used, torch.float32, self._device)
        if self._histories:
            values = torch.cat([values, stack_histories(self._histories).flatten()])
        values = self.transport.max(values, "scale").wait()
        if self._histories:
            rows = values[len(used) :].view(len(self._histories), -1)
            unstack_histories_(self._histories, rows)
        if all(used):
            return
        somewhere = values[: len(used)].tolist()
        parameters = [p for b in self._buckets for p in b.parameters]
        for p, used_somewhere in zip(parameters, somewhere, strict=True):
            if not used_somewhere:
                p.grad = None


def _plain(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """A mean's values; NaN where FP8 saturated a value that was not finite."""
    if isinstance(mean, ScaledTensor):
        mean = nan_unless_finite(mean.dequantize(torch.float32), mean.amax)
    return mean.to(dtype)


def ddp(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    group: dist.ProcessGroup | None = None,
    algorithm: str = "two_shot",
    dtype: torch.dtype = torch.float8_e4m3fn,
    bucket_bytes: int = 25 * 2**20,
    auto_scale: AutoScaleRule | None = None,
    fp8_gradients: bool = False,
) -> DataParallel:
    """Average the gradients of `model` over ranks in every backward. Collective: all ranks call it
    with the same model and options, and then have rank 0's parameters and buffers.

        parallel = qv.distributed.ddp(model)
        with parallel.no_sync():            # for micro-batches before the last
            loss(first).backward()
        loss(last).backward()               # leaves the mean of all ranks in .grad

    Gradients that backward leaves in FP8 (of weights converted by fp8lm-*) are sent in FP8, with
    identical bytes on every rank as the result; all others in their own dtype (coat's bf16), summed
    in f32 in rank order. Neither depends on bucket_bytes, except with `ring`. A value that is not
    finite on one rank makes that gradient's amax, or its mean, not finite on every rank, so that
    qv.AdamW skips the step on all of them. A parameter that a rank did not use counts as zeros
    there; one that none used keeps no gradient. A rank must use at least one parameter in each
    backward.

    Args:
        optimizer: a ZeRO optimizer of stage 2 keeps each gradient on its owner alone.
        group: default the default group.
        algorithm, dtype: as all_reduce_mean.
        bucket_bytes: of gradients that are sent together.
        auto_scale: AutoScaleRule of `ring`.
        fp8_gradients: sends the weight gradients of all converted linear layers in FP8, also where
            backward leaves them plain (tensorwise, coat); `.grad` is then the decoded mean.

    Raises:
        ValueError: options out of range, parameters on several devices, or ranks that disagree on
            options, recipe, shapes or the order of parameters: the first difference is named.
        RankFailure: from backward, where a rank is gone.
    """
    return DataParallel(
        model, optimizer, group, algorithm, dtype, bucket_bytes, auto_scale, fp8_gradients
    )
