"""Measures the errors of FP8 in a training step, tensor by tensor, without changing a bit of it.

    probe = Probe(model, optimizer)
    with probe.watching():
        loss(model(x)).backward()
    probe.before_update()
    optimizer.step()
    probe.after_update()  # {tensor: {"snr_db": .., "zeros": .., "saturated": .., "k": ..}}

Every figure is of codes that the step made, or of an identical cast that the probe repeats.
"""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager

import torch
from torch import Tensor

from .layout import Layout
from .nn import MLP, LinearBase, Norm
from .structure import ACTIVATIONS
from .tensor import ScaledTensor

_ops = torch.ops.quaver
EXPANSION_MASK, EXPANSION_ONE = 0xFF, 16  # k of a group, in the low byte of its scale; codec.h


class Probe:
    """Measures these figures of one step, for each tensor in a low-precision format:

    snr_db: 10 log10 of the power of the values over that of their rounding errors; None where the
        values before the cast are gone (gradients that were accumulated in FP8) or not finite, or
        nothing was rounded.
    zeros, saturated: share of codes that are zero, and of the format's largest magnitude.
    k: {"min", "mean", "max"} of the exponents of dynamic range expansion, where there is one.

    Tensors are named MODULE.input, .output (of norms), .product (of MLPs), .saved* (what a norm or
    an MLP keeps for backward) and .grad_output, and PARAMETER.grad, .exp_avg and .exp_avg_sq.
    """

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.found: dict[str, dict] = {}
        self.before: dict[str, Tensor] = {}

    @contextmanager
    def watching(self):
        """Measures activations and output gradients of the forward and backward inside."""
        handles = []
        for name, module in self.model.named_modules():
            if isinstance(module, Norm):
                handles.append(module.register_forward_hook(self._norm_hook(name)))
            elif isinstance(module, MLP):
                handles += self._mlp_hooks(name, module)
            elif isinstance(module, LinearBase):
                handles.append(module.register_forward_hook(self._linear_hook(name)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def before_update(self):
        """Measures gradients; call it when they are complete, before the optimizer's step."""
        for name, p in self.model.named_parameters():
            if isinstance(p.grad, ScaledTensor):
                self._measure(f"{name}.grad", p.grad)
            for key in ("exp_avg", "exp_avg_sq"):
                state = self.optimizer.state.get(p, {}).get(key)
                if isinstance(state, ScaledTensor):
                    self.before[f"{name}.{key}"] = copy.deepcopy(state)

    def after_update(self) -> dict[str, dict]:
        """Measures the optimizer's states and returns everything."""
        names = {p: name for name, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and p in names:
                    self._states(names[p], p, group["betas"])
        self.before.clear()
        return self.found

    def _states(self, name, p, betas):
        grad = _values(p.grad.detach())
        for key, beta, power in (("exp_avg", betas[0], 1), ("exp_avg_sq", betas[1], 2)):
            state = self.optimizer.state.get(p, {}).get(key)
            if not isinstance(state, ScaledTensor):
                continue
            old = self.before.get(f"{name}.{key}")
            exact = (1 - beta) * grad**power  # arXiv 1711.05101, algorithm 2
            if old is not None:
                exact = exact + beta * _values(old)
            self._measure(f"{name}.{key}", state, exact)

    def _linear_hook(self, name):
        def hook(module, arguments, output):
            x = arguments[0].detach()
            if not _is_ready(x):  # else the module that cast it measures it
                self._cast(f"{name}.input", x, module.rule.input, module.input_history, module)
            if not output.requires_grad:
                return
            history = None if module.grad_history is None else module.grad_history.clone()

            def seen(grad):
                where = f"{name}.grad_output"
                if _is_ready(grad):
                    self._measure(where, grad)
                else:
                    self._cast(where, grad.detach(), module.rule.grad_output, history, module)

            output.register_hook(seen)

        return hook

    def _norm_hook(self, name):
        def hook(module, arguments, output):
            x = _values(arguments[0].detach())
            xhat = x - x.mean(-1, keepdim=True) if module.centered else x
            eps = module.epsilon
            eps = torch.finfo(arguments[0].dtype).eps if eps is None else eps
            y = xhat * (xhat.square().mean(-1, keepdim=True) + eps).rsqrt()
            if module.weight is not None:
                y = y * (module.weight.detach().float() + module.offset)
            if getattr(module, "bias", None) is not None:
                y = y + module.bias.detach().float()
            self._measure(f"{name}.output", output.detach(), y)
            self._groups(f"{name}.saved", x, module.activation.block)

        return hook

    def _mlp_hooks(self, name, module):
        plan, made = module.plan, {}

        def keep(which):
            def hook(layer, arguments, output):
                made[which] = output.detach()

            return hook

        def product(layer, arguments):
            gate, up = made.pop(plan.gate), made.pop(plan.up, None)
            if plan.up == plan.gate:
                gate, up = gate.chunk(2, dim=-1)
            y = ACTIVATIONS[plan.kind](gate.float())
            y = y if up is None else y * up.float()
            if getattr(layer, "channel_amax", None) is not None:
                y = y / layer.channels()
            self._measure(f"{name}.product", arguments[0].detach(), y)
            block = module.activation.block
            self._groups(f"{name}.saved_gate", gate, block)
            if up is not None:
                self._groups(f"{name}.saved_up", up, block)

        layers = {plan.gate, plan.up} - {None}
        handles = [getattr(module, at).register_forward_hook(keep(at)) for at in sorted(layers)]
        return [*handles, getattr(module, plan.down).register_forward_pre_hook(product)]

    def _groups(self, name, x, block):
        """Repeats the cast of an input that is saved for backward."""
        q, scale, _ = _ops.quantize(
            x, torch.float8_e4m3fn, None, None, "block", block, True, False, 0
        )
        self._measure(
            name, ScaledTensor(q, scale, None, x.dtype, Layout("e4m3", "block", block)), _values(x)
        )

    def _cast(self, name, x, dtype, history, module):
        """The cast that a linear layer makes of x, again. Of layers that share an input under
        delayed scaling, the first one's history made it."""
        history = history.clone() if history is not None and module.training else None
        x, rule = x.reshape(-1, x.shape[-1]), module.rule
        layout = Layout.of(dtype, rule.grain)
        q, scale, _ = _ops.quantize(
            x, dtype, None, history, rule.grain, layout.block, rule.power_of_two, False, 0
        )
        self._measure(name, ScaledTensor(q, scale, None, x.dtype, layout), _values(x))

    @torch.no_grad()
    def _measure(self, name, stored: ScaledTensor, exact: Tensor | None = None):
        codes = stored.qdata.float().abs()
        count = max(1, codes.numel())
        top = torch.finfo(stored.qdata.dtype).max
        found = {
            "snr_db": None if exact is None else _snr(exact, _values(stored)),
            "zeros": (codes == 0).sum().item() / count,
            "saturated": (codes == top).sum().item() / count,
        }
        if stored.qlayout.expand:
            power = (stored.scale.view(torch.int32) & EXPANSION_MASK).clamp(min=EXPANSION_ONE)
            k = power.float() / EXPANSION_ONE
            found["k"] = {"min": k.min().item(), "mean": k.mean().item(), "max": k.max().item()}
        self.found[name] = found


def _is_ready(x) -> bool:
    return isinstance(x, ScaledTensor) and x.qt is not None


def _values(x: Tensor) -> Tensor:
    return x.dequantize(torch.float32) if isinstance(x, ScaledTensor) else x.float()


def _snr(exact: Tensor, stored: Tensor) -> float | None:
    signal = exact.double().square().sum().item()
    noise = (exact.double() - stored.double()).square().sum().item()
    if not (0 < signal < math.inf and 0 < noise < math.inf):
        return None
    return 10 * math.log10(signal / noise)
