"""Memory by kind, counted from the storages that exist. Nothing here is estimated."""

from contextlib import contextmanager

import torch
from torch import nn

from quaver import structure
from quaver.nn import MLP, Linear, Norm
from quaver.tensor import is_sharded, plain_tensors

__all__ = ["SavedActivations", "memory_report", "saved_activations"]

KINDS = ("weight", "weight_fp8", "master", "grad", "exp_avg", "exp_avg_sq")
ACTIVATION_KINDS = ("linear", "norm", "mlp", "attention", "other")
OUTSIDE = "outside"  # the layer of what is saved outside of the model's forward, say by the loss


def _storages(value):
    """{identity: storage} of a tensor, without empty ones. An address is no identity, because FSDP2
    frees the memory of a gathered weight and keeps its storage."""
    found = (tensor.untyped_storage() for tensor in plain_tensors(value))
    return {storage._cdata: storage for storage in found if storage.nbytes()}


class _Ledger:
    """Bytes by kind, every storage counted once, for the kind that claims it first."""

    def __init__(self):
        self.seen = {}
        self.bytes = dict.fromkeys((*KINDS, "other"), 0)

    def add(self, kind, value):
        """Books `value` under `kind`; returns the bytes that are new."""
        if is_sharded(value):  # FSDP2 lays the gradients of several parameters into one storage
            found = {t.data_ptr(): t.nbytes for t in plain_tensors(value) if t.nbytes}
        else:
            found = {at: storage.nbytes() for at, storage in _storages(value).items()}
        new = {at: size for at, size in found.items() if at not in self.seen}
        self.seen |= new
        size = sum(new.values())
        self.bytes[kind] += size
        return size


def _copies(module):
    """The cached FP8 forms of a Linear's weight."""
    cached = getattr(module, "fp8_weight", None)
    return [] if cached is None else [cached.row, cached.col]


def memory_report(model, optimizer=None, activations=None):
    """Bytes of a training state by kind, as a dict of ints.

    weight, master: a parameter that `optimizer` updates in place is its own master and counts there
        (f32 weights under bf16 autocast, f16 weights under O2); weight holds what has a separate
        master or is not trained. Without an optimizer everything is weight.
    weight_fp8: cached FP8 copies for the matrix products, a function of the weights.
    grad: what `.grad` holds now. exp_avg, exp_avg_sq: optimizer states of these names.
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
    """
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
                book(key if key in KINDS else "other", value, parameter)
    for module in model.modules():
        for copy in _copies(module):
            book("weight_fp8", copy, module.weight)
    for buffer in model.buffers():
        ledger.add("other", buffer)

    report = dict(ledger.bytes)
    report["activation"] = activations.bytes if activations else 0
    report["total"] = sum(report.values())
    report["activation_linear"] = activations.linear_bytes if activations else 0
    report["activation_by_layer"] = activations.by_layer if activations else {}
    report["bytes_per_param"] = _per_parameter(weights, converted.values())
    return report


def _linear_weights(model):
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    converted = [module for module in linears if isinstance(module, Linear)]
    return [module.weight for module in converted or linears]


def _per_parameter(weights, parameters):
    count = sum(parameter.numel() for parameter in parameters)
    if not count:
        return {}
    per = {kind: size / count for kind, size in weights.items()}
    state = sum(per[kind] for kind in ("master", "grad", "exp_avg", "exp_avg_sq"))
    return per | {"state": state, "all": state + per["weight"] + per["weight_fp8"]}


class SavedActivations:
    """What a forward saved for its backward. Filled by `saved_activations`, valid after its block.

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

    def by_kind(self):
        """{kind: bytes} over all layers."""
        return activation_by_kind(self.by_layer)


def activation_by_kind(by_layer):
    """{kind: bytes} of {layer: {kind: bytes}}, every kind of ACTIVATION_KINDS."""
    layers = by_layer.values()
    return {kind: sum(layer.get(kind, 0) for layer in layers) for kind in ACTIVATION_KINDS}


def _kind(module):
    name = type(module).__name__.lower()
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Norm) or structure.is_norm(module):
        return "norm"
    if isinstance(module, MLP) or structure.mlp_candidate(module):
        return "mlp"
    return "attention" if "attention" in name or "attn" in name else None


class _Places:
    """Which layer and kind a running module is: by its position and by what is around it."""

    def __init__(self, model):
        self.kinds = {name: _kind(module) for name, module in model.named_modules()}
        self.elements = {
            f"{name}.{child}" if name else child
            for name, module in model.named_modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            for child, _ in module.named_children()
        }

    def of(self, running):
        """`running`: names of the modules that run, outermost first."""
        layer = next((name for name in running if name in self.elements), None)
        if layer is None:
            layer = running[-1] if running else OUTSIDE
        kinds = (self.kinds[name] for name in reversed(running))
        return layer, next((kind for kind in kinds if kind), "other")


def _is_cast_of_parameter(tensor):
    """True for a copy, view or cast of a leaf: autocast saves such a copy of every weight."""
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
        if hasattr(node, "variable"):  # AccumulateGrad
            return isinstance(node.variable, nn.Parameter)
    return False


@contextmanager
def saved_activations(model):
    """Counts what the forward inside the block saves for backward, without parameters, buffers and
    copies of weights (casts under autocast, FP8 forms). Yields a SavedActivations.

        with qv.saved_activations(model) as saved:
            loss = model(x).sum()
        loss.backward()
        saved.bytes, saved.linear_bytes

    Run only forwards inside: the storages are held until the block ends.
    """
    result = SavedActivations()
    saved = {}  # identity: storage. Kept alive, so that an identity names one storage only.
    owner = {}  # identity: (layer, kind)
    gathered = {}  # the weights of running modules, which FSDP2 gathered for them
    modules = dict(model.named_modules())
    by_module = {}
    places = _Places(model)
    running = []  # names of modules, outermost first

    def pack(tensor):
        if not _is_cast_of_parameter(tensor):
            found = _storages(tensor)
            saved.update(found)
            place = places.of(running)
            for at in found:
                owner.setdefault(at, place)
            if running:
                for parameter in modules[running[-1]].parameters(recurse=False):
                    gathered.update(_storages(parameter))
            if running and running[-1] in by_module:
                by_module[running[-1]] |= found
        return tensor

    handles = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            by_module[name] = {}

        def enter(module, arguments, name=name):
            running.append(name)

        def leave(module, arguments, output):
            running.pop()

        handles.append(module.register_forward_pre_hook(enter))
        # always_call: a forward that raises must not leave its name behind.
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield result
    finally:
        for handle in handles:
            handle.remove()
    # Looked up last: the first forward is what makes the FP8 copies.
    kept = gathered
    for tensor in (*model.parameters(), *model.buffers()):
        kept |= _storages(tensor)
    for module in model.modules():
        for copy in _copies(module):
            kept |= _storages(copy)

    def size(storages):
        return sum(storage.nbytes() for at, storage in storages.items() if at not in kept)

    linear = {at: storage for found in by_module.values() for at, storage in found.items()}
    result.bytes, result.linear_bytes = size(saved), size(linear)
    result.by_module = {name: size(found) for name, found in by_module.items()}
    for at, (layer, kind) in owner.items():
        if at not in kept:
            kinds = result.by_layer.setdefault(layer, {})
            kinds[kind] = kinds.get(kind, 0) + saved[at].nbytes()
