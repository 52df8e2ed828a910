"""The activations that a forward saves for its backward, in bytes by layer and kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import structure
from .memory import SavedActivations, Storages, fp8_copies, storages_of
from .nn import MLP, LinearBase, Norm

__all__ = ["saved_activations"]

# Nodes that choose values of a parameter, which are activations and no form of the weight.
CHOOSING = ("EmbeddingBackward", "IndexSelectBackward", "IndexBackward", "GatherBackward")
OUTSIDE = "outside"  # the layer of what is saved outside of the model's forward, say by the loss


def _kind(module: nn.Module) -> str | None:
    name = type(module).__name__.lower()
    if isinstance(module, (nn.Linear, LinearBase)):
        return "linear"
    if isinstance(module, Norm) or structure.is_norm(module):
        return "norm"
    if isinstance(module, MLP) or structure.mlp_candidate(module):
        return "mlp"
    return "attention" if "attention" in name or "attn" in name else None


class _Places:
    """The layer and kind of a running module, by its position and by the modules around it."""

    def __init__(self, model: nn.Module):
        self.kinds = {name: _kind(module) for name, module in model.named_modules()}
        self.elements = {
            f"{name}.{child}" if name else child
            for name, module in model.named_modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            for child, _ in module.named_children()
        }

    def of(self, running: list[str]) -> tuple[str, str]:
        """`running`: names of the modules that run, outermost first."""
        layer = next((name for name in running if name in self.elements), None)
        if layer is None:
            layer = running[-1] if running else OUTSIDE
        kinds = (self.kinds[name] for name in reversed(running))
        return layer, next((kind for kind in kinds if kind), "other")


def _is_cast_of_parameter(tensor: Tensor) -> bool:
    """True for a copy, view or cast of a leaf: autocast saves such a copy of every weight."""
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        if node.name().startswith(CHOOSING):
            return False
        node = node.next_functions[0][0]
        if hasattr(node, "variable"):  # AccumulateGrad
            return isinstance(node.variable, nn.Parameter)
    return False


class _Trace:
    """The storages that running modules save, each owned by the module that saved it first."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = dict(model.named_modules())
        self.places = _Places(model)
        self.running: list[str] = []  # names of modules, outermost first
        self.saved: Storages = {}  # kept alive, so that an identity names one storage only
        self.owner: dict[int, tuple[str, str]] = {}  # identity: (layer, kind)
        self.gathered: Storages = {}  # weights of running modules, which FSDP2 gathered for them
        self.by_linear: dict[str, Storages] = {
            name: {}
            for name, module in self.modules.items()
            if isinstance(module, (nn.Linear, LinearBase))
        }

    def pack(self, tensor: Tensor) -> Tensor:
        """The hook of autograd, which keeps what this returns."""
        if not _is_cast_of_parameter(tensor):
            self._book(storages_of(tensor))
        # An output that its own node keeps would be a circle, which nothing frees before backward.
        return tensor if tensor.grad_fn is None else tensor.detach()

    def _book(self, found: Storages) -> None:
        self.saved |= found
        place = self.places.of(self.running)
        for at in found:
            self.owner.setdefault(at, place)
        if self.running:
            name = self.running[-1]
            for parameter in self.modules[name].parameters(recurse=False):
                self.gathered |= storages_of(parameter)
            if name in self.by_linear:
                self.by_linear[name] |= found

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follows which modules run."""
        handles = []
        for name, module in self.modules.items():

            def enter(module, arguments, name=name):
                self.running.append(name)

            def leave(module, arguments, output):
                self.running.pop()

            handles.append(module.register_forward_pre_hook(enter))
            # always_call: a forward that raises must not leave its name behind.
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def fill(self, result: SavedActivations) -> None:
        """Counts what was saved, when all modules have run."""
        # Looked up last: the first forward is what makes the FP8 copies.
        kept = self.gathered
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            kept |= storages_of(tensor)
        for module in self.modules.values():
            for copy in fp8_copies(module):
                kept |= storages_of(copy)

        def size(storages: Storages) -> int:
            return sum(storage.nbytes() for at, storage in storages.items() if at not in kept)

        linear = {at: storage for found in self.by_linear.values() for at, storage in found.items()}
        result.bytes, result.linear_bytes = size(self.saved), size(linear)
        result.by_module = {name: size(found) for name, found in self.by_linear.items()}
        for at, (layer, kind) in self.owner.items():
            if at not in kept:
                kinds = result.by_layer.setdefault(layer, {})
                kinds[kind] = kinds.get(kind, 0) + self.saved[at].nbytes()
        # Autograd keeps `pack`, and so this trace, until backward has freed every saved tensor.
        for storages in (self.saved, self.gathered, *self.by_linear.values()):
            storages.clear()


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedActivations]:
    """Counts what the forward inside the block saves for backward, without parameters, buffers and
    copies of weights (casts under autocast, FP8 forms). Yields a SavedActivations.

        with qv.saved_activations(model) as saved:
            loss = model(x).sum()
        loss.backward()
        saved.bytes, saved.linear_bytes

    Run only forwards inside: the storages are held until the block ends.
    """
    result, trace = SavedActivations(), _Trace(model)
    with trace.watching():
        yield result
    trace.fill(result)
