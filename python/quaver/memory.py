"""Memory by kind, counted from the storages that exist. Nothing here is estimated."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .nn import FrozenLinear, LinearBase
from .tensor import is_sharded, plain_tensors

__all__ = ["ACTIVATION_KINDS", "KINDS", "SavedActivations", "activation_by_kind", "memory_report"]

PARTS = {
    "remainder": "master",
    "basis": "exp_avg",
    "counts": "exp_avg",
    "rows": "exp_avg",
    "factors": "exp_avg",
    "exp_avg_scale": "exp_avg",
    **dict.fromkeys(("exp_avg_sq_scale", "exp_avg_sq_row", "exp_avg_sq_col"), "exp_avg_sq"),
    **dict.fromkeys(("index", "value", "error", "error_range"), "exp_avg"),  # MicroAdam's
}  # of other kinds
KINDS = ("weight", "weight_fp8", "master", "grad", "exp_avg", "exp_avg_sq")
ACTIVATION_KINDS = ("linear", "norm", "mlp", "attention", "other")

Storages = dict[int, torch.UntypedStorage]  # by their identity


def storages_of(value: Tensor | None) -> Storages:
    """{identity: storage} of a tensor, without empty ones. An address is no identity, because FSDP2
    frees the memory of a gathered weight and keeps its storage."""
    found = (tensor.untyped_storage() for tensor in plain_tensors(value))
    return {storage._cdata: storage for storage in found if storage.nbytes()}


class SavedActivations:
    """The bytes that a forward saved for its backward, valid after `saved_activations`' block.

    bytes: of all storages, each once. linear_bytes: of those that Linear layers saved.
    by_module: {module name: bytes} for the Linear layers; a storage that several layers saved
    counts for each of them here.
    by_layer: {layer: {kind: bytes}}, each storage for the module that saved it first. A layer is an
    element of the outermost ModuleList or Sequential, else the module itself, or "outside" for what
    no module of the model saved, as the loss. Kinds are ACTIVATION_KINDS: of the innermost module
    that is a linear layer, a norm, an MLP or (by the name of its class) attention; else "other".
    """

    def __init__(self):
        self.bytes = self.linear_bytes = 0
        self.by_module, self.by_layer = {}, {}

    def by_kind(self) -> dict[str, int]:
        """{kind: bytes} over all layers."""
        return activation_by_kind(self.by_layer)


def activation_by_kind(by_layer: dict[str, dict[str, int]]) -> dict[str, int]:
    """{kind: bytes} of {layer: {kind: bytes}}, every kind of ACTIVATION_KINDS."""
    layers = by_layer.values()
    return {kind: sum(layer.get(kind, 0) for layer in layers) for kind in ACTIVATION_KINDS}


class _Ledger:
    """Bytes by kind, every storage counted once, for the kind that claims it first."""

    def __init__(self):
        self.seen = {}
        self.bytes = dict.fromkeys((*KINDS, "other"), 0)

    def add(self, kind: str, value: Tensor | None) -> int:
        """Books `value` under `kind`; returns the bytes that are new."""
        if is_sharded(value):  # FSDP2 lays the gradients of several parameters into one storage
            parts = [t for t in plain_tensors(value) if t.nbytes]
            found = {(t.untyped_storage()._cdata, t.storage_offset()): t.nbytes for t in parts}
        else:
            found = {at: storage.nbytes() for at, storage in storages_of(value).items()}
        new = {at: size for at, size in found.items() if at not in self.seen}
        self.seen |= new
        size = sum(new.values())
        self.bytes[kind] += size
        return size


def fp8_copies(module: nn.Module) -> list[Tensor]:
    """The cached FP8 forms of a Linear's weight."""
    cached = getattr(module, "fp8_weight", None)
    return [] if cached is None else [cached.q, cached.qt]


def memory_report(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    activations: SavedActivations | None = None,
    *,
    batch: Tensor | tuple[int, int] | None = None,
) -> dict:
    """Bytes of a training state by kind, as a dict of ints.

    weight, master: a parameter that `optimizer` updates in place is its own master and counts there
        (f32 weights under bf16 autocast, f16 weights under O2); weight holds what has a separate
        master or is not trained, FrozenLinear's codes too. Without an optimizer everything is
        weight.
    weight_fp8: cached FP8 copies for the matrix products, a function of the weights.
    grad: what `.grad` holds now. exp_avg, exp_avg_sq: optimizer states of these names; all
        states of MicroAdam count as exp_avg.
    other: buffers and all further optimizer states.
    activation, activation_linear: from `activations`, see `saved_activations`; 0 without.
    activation_by_layer: {layer: {kind: bytes}}, which add up to `activation`; {} without.
    total: the sum of all kinds.
    bytes_per_param: for the weights of converted Linear layers (of every nn.Linear where none is
        converted): bytes per weight for each kind, "state" = master + grad + exp_avg + exp_avg_sq,
        and "all" with weight and weight_fp8 too. Scales are counted with what they scale.

    Of a sharded tensor this rank's elements count. Every other storage counts once, with all its
    bytes. Gradients are there only between backward and
    zero_grad, states only after the first step.

    With `batch`, tokens [sequences, length] or that shape, the report is of a training step of this
    model and optimizer, wherever it is called: gradients, states and activations are there, and

    peak, peak_by_kind, peak_at: the most bytes at once, what they are, and where in the step, as in
        `qv.plan`. The step runs on copies without storage; an autocast in force here is the step's.

    Raises UsageError with `batch` for a model that does not run on tokens or is sharded.
    """
    if batch is not None:
        # By name: plans are made of reports.
        planning = importlib.import_module(f"{__package__}.planning.report")
        return planning.step_report(model, optimizer, batch)
    ledger = _Ledger()
    updated = set()
    if optimizer is not None:
        owns = getattr(optimizer, "owns", lambda p: True)  # a sharded one has masters elsewhere
        updated = {id(p) for group in optimizer.param_groups for p in group["params"] if owns(p)}
    converted = {id(p): p for p in _linear_weights(model)}
    weights = dict.fromkeys(KINDS, 0)

    def book(kind, value, parameter):
        size = ledger.add(kind, value)
        if id(parameter) in converted and kind in weights:
            weights[kind] += size

    for parameter in model.parameters():
        state = optimizer.state.get(parameter, {}) if id(parameter) in updated else {}
        own_master = id(parameter) in updated and "master" not in state
        book("master" if own_master else "weight", parameter, parameter)
        book("grad", parameter.grad, parameter)
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                key = PARTS.get(key, key)
                book(key if key in KINDS else "other", value, parameter)
    for module in model.modules():
        for copy in fp8_copies(module):
            book("weight_fp8", copy, module.weight)
        for part in module.buffers(recurse=False) if isinstance(module, FrozenLinear) else ():
            ledger.add("weight", part)
    for buffer in model.buffers():
        ledger.add("other", buffer)

    report = dict(ledger.bytes)
    report["activation"] = activations.bytes if activations else 0
    report["total"] = sum(report.values())
    report["activation_linear"] = activations.linear_bytes if activations else 0
    report["activation_by_layer"] = activations.by_layer if activations else {}
    report["bytes_per_param"] = _per_parameter(weights, converted.values())
    return report


def _linear_weights(model: nn.Module) -> list[Tensor]:
    linears = [m for m in model.modules() if isinstance(m, (nn.Linear, LinearBase))]
    converted = [module for module in linears if isinstance(module, LinearBase)]
    return [module.weight for module in converted or linears]


def _per_parameter(weights: dict[str, int], parameters: Iterable[Tensor]) -> dict[str, float]:
    count = sum(parameter.numel() for parameter in parameters)
    if not count:
        return {}
    per = {kind: size / count for kind, size in weights.items()}
    state = sum(per[kind] for kind in ("master", "grad", "exp_avg", "exp_avg_sq"))
    return per | {"state": state, "all": state + per["weight"] + per["weight_fp8"]}
