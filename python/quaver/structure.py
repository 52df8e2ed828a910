"""Finds the norms and MLPs of a model of any library, and the readers of a norm.

A norm is recognised by its result, an MLP and the readers of a norm by the operations that
`torch.fx` records of their forward, with child modules as single steps. Modules that do
anything else are not recognised, and `convert_report` gives the reason.
"""

from __future__ import annotations

import copy
import inspect
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .nn.linear import is_converted
from .nn.mlp import MLPPlan
from .ops import FLOATS

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class NotRecognized(Exception):
    """The module was not recognized; str() is the reason."""


@dataclass(frozen=True)
class NormForm:
    """(x - mean?) * rsqrt(var + eps) * (offset + weight) + bias over the last axis of `width`."""

    width: int
    eps: float | None
    centered: bool
    offset: float = 0.0


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: by its type, or by a weight vector and an epsilon alone."""
    if type(module) in (nn.RMSNorm, nn.LayerNorm):
        return True
    own = dict(module.named_parameters(recurse=False))
    if any(is_lazy(p) for p in own.values()):
        return False
    return (
        set(own) in ({"weight"}, {"weight", "bias"})
        and all(p.dim() == 1 for p in own.values())
        and _epsilon(module) is not None
        and not any(True for _ in module.children())
        and not isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
    )


def is_lazy(parameter: nn.Parameter) -> bool:
    """Whether it has no shape yet (nn.LazyLinear before its first batch)."""
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, by its name and attributes: y = x @ weight + bias, of weight [K, N]."""
    own = dict(module.named_parameters(recurse=False))
    width = getattr(module, "nf", None)
    return (
        type(module).__name__ == "Conv1D"
        and set(own) == {"weight", "bias"}
        and own["weight"].dim() == 2
        and own["weight"].shape[1] == width
        and own["bias"].shape == (width,)
    )


def _epsilon(module: nn.Module) -> float | None:
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def norm_form(module: nn.Module) -> NormForm:
    """The form of a norm. Raises NotRecognized where it computes anything else."""
    if type(module) in (nn.RMSNorm, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            raise NotRecognized(f"it normalises over {len(module.normalized_shape)} axes")
        form = NormForm(module.normalized_shape[0], module.eps, type(module) is nn.LayerNorm)
    else:
        form = _probed_form(module)
    for parameter in module.parameters(recurse=False):
        if parameter.dtype not in FLOATS:
            raise NotRecognized(f"its weight is {parameter.dtype}")
    return form


def _probed_form(module: nn.Module) -> NormForm:
    """The form found by comparison on a copy with random parameters, on the CPU in f32."""
    width, eps = module.weight.numel(), _epsilon(module)
    twin = copy.deepcopy(module).to_empty(device="cpu").float()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, width, generator=random, dtype=torch.float32) * 2 + 1
    x[1] *= eps**0.5  # where epsilon shows
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(width, generator=random, dtype=torch.float32))
        try:
            got = twin(x)
        except Exception as error:  # whatever a foreign forward may raise
            raise NotRecognized(f"it does not run on one matrix: {error}") from None
        weight, bias = twin.weight, getattr(twin, "bias", None)
        for centered in (False, True):
            mean = x.mean(-1, keepdim=True) if centered else 0.0
            xhat = (x - mean) * ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
            for offset in (0.0, 1.0):
                y = xhat * (weight + offset) + (0.0 if bias is None else bias)
                # The tolerance covers f32 rounding; any other formula differs by far more.
                if _equal(got, y, rtol=1e-4, atol=1e-5):
                    return NormForm(width, eps, centered, offset)
    raise NotRecognized("it computes something else than RMSNorm or LayerNorm")


def _equal(got, wanted: Tensor, rtol: float, atol: float) -> bool:
    """Whether a foreign function gave `wanted`; its result may be no tensor at all."""
    if not isinstance(got, Tensor) or got.shape != wanted.shape:
        return False
    return torch.allclose(got.to(wanted.dtype), wanted, rtol=rtol, atol=atol)


class _Child:
    """Mixin of the stand-ins for a traced module's children: a call is one step of the trace."""

    def __call__(self, *args, **kwargs):
        tracer, name = self.__dict__["_quaver_step"]
        return tracer.create_proxy("call_module", name, args, kwargs)


class _Tracer(fx.Tracer):
    """Records what a forward does with proxies. Its `trace` is not used: that replaces methods of
    nn.Module, which breaks the forwards of all other threads meanwhile."""

    def __init__(self):
        super().__init__()
        self.graph, self.twins = fx.Graph(tracer_cls=_Tracer), {}

    def stand_in(self, module: nn.Module, name: str = "") -> nn.Module:
        """A shallow copy of `module`, whose children are stand-ins too."""
        known = self.twins.get(id(module))
        if known is not None:
            return known
        kind = type(module)
        if name:
            kind = type(kind.__name__, (_Child, kind), {"__module__": kind.__module__})
        twin = self.twins[id(module)] = object.__new__(kind)
        twin.__dict__.update(vars(module), _quaver_step=(self, name))
        for key in ("_parameters", "_buffers"):
            twin.__dict__[key] = dict(twin.__dict__[key])
        path = f"{name}." if name else ""
        twin.__dict__["_modules"] = {
            key: None if child is None else self.stand_in(child, path + key)
            for key, child in module._modules.items()
        }
        return twin

    def create_arg(self, a):
        """Parameters and constants are steps without a name: nothing here depends on which."""
        if isinstance(a, (Tensor, nn.Module)):
            return self.create_node("get_attr", "constant", (), {})
        return super().create_arg(a)


def steps(module: nn.Module) -> fx.Graph:
    """The steps of a forward of `module` with its required arguments alone. Raises
    NotRecognized."""
    if "forward" in vars(module):
        raise NotRecognized("its forward was replaced")
    forward = inspect.unwrap(type(module).forward)
    _, *parameters = inspect.signature(forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    tracer = _Tracer()
    inputs = [tracer.create_proxy("placeholder", p.name, (), {}) for p in required]
    try:
        result = forward(tracer.stand_in(module), *inputs)
        tracer.create_node("output", "output", (tracer.create_arg(result),), {})
    except Exception as error:  # whatever a foreign forward may do with a stand-in for its input
        sentence = str(error).strip().partition("\n")[0].partition(". ")[0] or repr(error)
        raise NotRecognized(f"its forward cannot be traced: {sentence}") from None
    return tracer.graph


def _target(module: nn.Module, node) -> nn.Module | None:
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return module.get_submodule(node.target) if is_call else None


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    """Arguments that anything reads."""
    return [node for node in graph.nodes if node.op == "placeholder" and node.users]


def mlp_candidate(module: nn.Module) -> bool:
    """Two or three linear layers, one of which reads as many features as another gives."""
    layers = [c for c in module.children() if isinstance(c, nn.Linear) or is_converted(c)]
    wide = {n for layer in layers for n in (layer.out_features, layer.out_features / 2)}
    return 2 <= len(layers) <= 3 and any(
        layer.in_features in wide and layer.in_features > layer.out_features for layer in layers
    )


def mlp_plan(module: nn.Module) -> MLPPlan:
    """The parts of an MLP. Raises NotRecognized where its forward does anything else."""
    graph = steps(module)
    kept = [n for n in graph.nodes if n.op not in ("placeholder", "output") and n.users]
    used = []

    def layer(node, source=None):
        found = _target(module, node)
        if found is None or not is_converted(found):
            raise NotRecognized("a layer of it is no converted nn.Linear")
        if source is not None and node.args != (source,):
            raise NotRecognized(f"{node.target} reads something else than the MLP's input")
        used.append(node)
        return node.target

    inputs = _inputs(graph)
    if len(inputs) != 1:
        raise NotRecognized(f"its forward reads {len(inputs)} inputs")
    (x,) = inputs
    (result,) = next(n for n in graph.nodes if n.op == "output").args
    down = layer(result)
    (product,) = result.args
    plan = None
    if not isinstance(product, fx.Node):
        raise NotRecognized("its output layer reads no activation")
    if _is_product(product):
        used.append(product)
        for act, other in (product.args, product.args[::-1]):
            kind = _kind(module, act)
            if kind is None:
                continue
            used.append(act)
            source = act.args[0]
            if source.op == "call_function" and source.target is operator.getitem:
                gate = up = layer(_halves(source, other, used), x)
            else:
                gate, up = layer(source, x), layer(other, x)
                if gate == up:
                    raise NotRecognized(f"{gate} is its gate and its other branch")
            plan = MLPPlan(gate, up, down, kind)
            break
    else:
        kind = _kind(module, product)
        if kind is not None:
            used.append(product)
            plan = MLPPlan(layer(product.args[0], x), None, down, kind)
    if plan is None:
        raise NotRecognized(f"its activation is none of {', '.join(ACTIVATIONS)}")
    if set(used) != set(kept):
        others = [str(getattr(n.target, "__name__", n.target)) for n in kept if n not in used]
        raise NotRecognized(f"its forward does more: {', '.join(others)}")
    return plan


def _is_product(node: fx.Node) -> bool:
    function = node.op == "call_function" and node.target in (operator.mul, torch.mul)
    method = node.op == "call_method" and node.target == "mul"
    two = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
    return (function or method) and two and not node.kwargs


def _halves(first: fx.Node, second: fx.Node, used: list) -> fx.Node:
    """The step whose result was chunked in two along the last axis, `first` before `second`."""
    pieces = first.args[0]
    fits = (
        isinstance(second, fx.Node)
        and second.target is operator.getitem
        and second.args == (pieces, 1)
        and first.args == (pieces, 0)
        and pieces.target in ("chunk", torch.chunk)
        and (*pieces.args[1:], *pieces.kwargs.values()) == (2, -1)
    )
    if not fits:
        raise NotRecognized("its gate is no first half of a layer's output")
    used.extend((first, second, pieces))
    return pieces.args[0]


def _kind(module: nn.Module, node) -> str | None:
    """The activation that a step computes."""
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module" and not any(True for _ in _target(module, node).parameters()):
        function = _target(module, node)
        if len(node.args) > 1 or node.kwargs or function._forward_hooks:
            return None
    elif node.op == "call_function":

        def function(x):
            return node.target(x, *node.args[1:], **node.kwargs)
    else:
        return None
    x = torch.linspace(-12, 12, 481, dtype=torch.float32)
    try:
        got = function(x)
    except Exception:  # a foreign function that does not take one tensor is no activation
        return None
    fits = (k for k, known in ACTIVATIONS.items() if _equal(got, known(x), rtol=1e-5, atol=1e-6))
    return next(fits, None)


def check_readers(parent: nn.Module, name: str, width: int) -> None:
    """Raises NotRecognized unless the result of the norm `name` goes to converted linear layers
    alone, directly or inside a child of `parent` that has some of this width."""
    try:
        graph = steps(parent)
    except NotRecognized as why:
        raise NotRecognized(f"its readers are unknown: of its parent, {why}") from None
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == name]
    if not calls:
        raise NotRecognized("the forward of its parent does not call it")
    for call in calls:
        _check_users(parent, call, width)


def _check_users(parent: nn.Module, node: fx.Node, width: int) -> None:
    if not node.users:
        raise NotRecognized("nothing reads it")
    for user in node.users:
        reader = _target(parent, user)
        if reader is None:
            what = getattr(user.target, "__name__", user.target)
            raise NotRecognized(f"{what} reads it, which is no linear layer")
        if is_converted(reader):
            continue
        layers = [m for m in reader.modules() if is_converted(m) and m.in_features == width]
        if not layers:
            raise NotRecognized(f"{user.target} reads it, which has no FP8 linear layer for it")
        try:
            inner = steps(reader)
        except NotRecognized:
            continue  # attention reshapes by sizes that a trace does not have
        inputs = _inputs(inner)
        if len(inputs) == 1:
            _check_users(reader, inputs[0], width)
