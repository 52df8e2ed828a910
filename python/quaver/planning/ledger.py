"""Every allocation of a step in order, with its kind and its place: the peak, and what it is of.

A dispatch mode sees each storage when an op makes it and when it is freed. Kinds are known late (a
tensor is a gradient once it lands in `.grad`), so events are kept and read when the step is over.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..tensor import plain_tensors

__all__ = ["PEAK_KINDS", "Ledger", "Peak"]

PEAK_KINDS = ("weights", "copies", "gradients", "states", "activations", "rest")


@dataclass(frozen=True)
class Peak:
    """The most bytes that exist at once, those of each of PEAK_KINDS, and where in the step."""

    bytes: int
    by_kind: dict[str, int]
    phase: str
    module: str

    @property
    def place(self) -> str:
        return f"{self.phase} of {self.module}" if self.module else self.phase


@dataclass
class _Storage:
    """`fresh`: made in a forward. `kind` is None until it is known."""

    size: int
    fresh: bool
    kind: str | None = None
    reference: weakref.ref | None = field(default=None, repr=False)


class Ledger(TorchDispatchMode):
    """Follows the storages that ops make while it is the mode in force, in `phase`.

    weights, gradients, states: of the model and its optimizer; buffers are weights. copies: casts
    and FP8 forms of weights, which are made of weights alone. activations: everything else that a
    forward makes, also one that activation checkpointing runs again. rest: temporaries of backward
    and of the optimizer, and messages.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.phase = "start"
        self._storages: dict[int, _Storage] = {}  # those that exist, by their identity
        self._events: list[tuple[int, _Storage, str, str | int]] = []
        self._running: list[str] = []  # names of modules, outermost first
        self._nodes: list[tuple[int, int, str]] = []  # first and last autograd nodes of a module
        self._model = model

    # What exists

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(t, "__tensor_flatten__") for t in types):
            return NotImplemented  # a subclass acts by ops on its parts
        out = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        new = [t for t in results if self._add(t)]
        if new and self.phase in ("forward", "backward") and self._of_weights((args, kwargs)):
            self.mark("copies", new)
        return out

    def _add(self, t: Tensor) -> bool:
        storage = t.untyped_storage()
        at = storage._cdata
        if at in self._storages:
            return False
        entry = _Storage(storage.nbytes(), self.phase == "forward" or bool(self._running))

        def freed(_, at=at):
            gone = self._storages.pop(at, None)
            if gone is not None:
                self._note(gone, -gone.size)

        entry.reference = weakref.ref(storage, freed)
        self._storages[at] = entry
        self._note(entry, entry.size)
        return True

    def _note(self, entry: _Storage, change: int) -> None:
        if change:
            self._events.append((change, entry, self.phase, self._where()))

    def _where(self) -> str | int:
        """The innermost module that runs, or the number of the node that backward is at."""
        if self._running:
            return self._running[-1]
        node = torch._C._current_autograd_node() if self.phase == "backward" else None
        return "" if node is None else node._sequence_nr()

    def _of_weights(self, arguments) -> bool:
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.numel() > 1]
        found = [self._storages.get(t.untyped_storage()._cdata) for t in tensors]
        return bool(found) and all(e is not None and e.kind in PEAK_KINDS[:2] for e in found)

    # What it is

    def mark(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Books the storages of `tensors` under `kind`, for as long as they exist."""
        for t in tensors:
            for part in plain_tensors(t):
                self._add(part)
                self._storages[part.untyped_storage()._cdata].kind = kind

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Books the new size of a storage, which FSDP2 frees and fills again."""
        entry = self._storages.get(storage._cdata)
        if entry is not None:
            change, entry.size = storage.nbytes() - entry.size, storage.nbytes()
            self._note(entry, change)

    @contextmanager
    def following(self) -> Iterator[Ledger]:
        """The mode in force, with hooks that follow which modules run and which gradients come."""
        handles, begun = [], []
        for name, module in self._model.named_modules():

            def enter(module, arguments, name=name):
                self._running.append(name)
                begun.append(torch.autograd._get_sequence_nr())

            def leave(module, arguments, output, name=name):
                if self._running[-1:] != [name]:
                    return  # another hook raised before `enter`
                self._running.pop()
                self._nodes.append((begun.pop(), torch.autograd._get_sequence_nr(), name))

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        for p in self._model.parameters():
            if p.requires_grad:
                hook = p.register_post_accumulate_grad_hook
                handles.append(hook(lambda p: self.mark("gradients", [p.grad])))
        try:
            with self, _resizing(self):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    # What it came to

    def peak(self) -> Peak:
        """The largest sum of all sizes, at its first event."""
        total = highest = last = 0
        for i, (change, *_) in enumerate(self._events):
            total += change
            if total > highest:
                highest, last = total, i
        by_kind = dict.fromkeys(PEAK_KINDS, 0)
        for change, entry, _, _ in self._events[: last + 1]:
            by_kind[entry.kind or ("activations" if entry.fresh else "rest")] += change
        _, _, phase, where = self._events[last]
        return Peak(highest, by_kind, phase, self._module(where))

    def _module(self, where: str | int) -> str:
        """The name of the innermost module that made an autograd node; none made the loss's."""
        if isinstance(where, str):
            return where
        inside = [n for n in self._nodes if n[0] <= where < n[1]]
        return min(inside, key=lambda n: n[1] - n[0])[2] if inside else "the loss"


@contextmanager
def _resizing(ledger: Ledger) -> Iterator[None]:
    """Books `resize_` of a storage, which no dispatch mode sees, as torch's MemTracker does."""
    original = torch.UntypedStorage.resize_

    def resize_(storage, size):
        original(storage, size)
        ledger.resized(storage)

    torch.UntypedStorage.resize_ = resize_
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original
