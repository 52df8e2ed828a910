"""Norms, MLPs and blocks that pass on FP8, and steps of them."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

import quaver as qv
from quaver import ScaledTensor, models, recipe
from quaver.models.llama import Block


def variant(linear=None, **changes):
    base = recipe.get("coat")
    return dataclasses.replace(
        base,
        linear=base.linear if linear is None else recipe.get(linear).linear,
        activation=dataclasses.replace(base.activation, **changes),
    )


RECIPES = {
    "coat": variant(),
    "delayed": variant("fp8lm-o2"),
    "plain weights": variant("tensorwise"),
    "small groups": variant(block=16),
    "smooth": variant(smooth_swiglu=True),
    "blocks": recipe.get("coat-blockwise"),
    "smooth blocks": variant("coat-blockwise", smooth_swiglu=True),
}


class PlainRMSNorm(nn.Module):
    """As a foreign library writes it."""

    def __init__(self, width, offset=0.0):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-5
        self.shift = offset

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (y * (self.weight + self.shift)).to(x.dtype)


class ShiftedRMSNorm(PlainRMSNorm):
    def __init__(self, width):
        super().__init__(width, 1.0)


NORMS = {
    "RMSNorm": lambda k: nn.RMSNorm(k, eps=1e-5),
    "RMSNorm without eps": nn.RMSNorm,
    "LayerNorm": nn.LayerNorm,
    "LayerNorm without bias": lambda k: nn.LayerNorm(k, bias=False),
    "LayerNorm without weight": lambda k: nn.LayerNorm(k, elementwise_affine=False),
    "a library's": PlainRMSNorm,
    "a library's, 1 + weight": ShiftedRMSNorm,
}


class Gated(nn.Module):
    def __init__(self, k, f, bias=False, kind="silu"):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(k, f, bias=bias), nn.Linear(k, f, bias=bias)
        self.down_proj = nn.Linear(f, k, bias=bias)
        self.act_fn = {"silu": nn.SiLU, "gelu": nn.GELU, "tanh": lambda: nn.GELU("tanh")}[kind]()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Fused(nn.Module):
    def __init__(self, k, f):
        super().__init__()
        self.gate_up, self.down = nn.Linear(k, 2 * f), nn.Linear(f, k)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(up * F.silu(gate))


class Plain(nn.Module):
    def __init__(self, k, f):
        super().__init__()
        self.up, self.down = nn.Linear(k, f), nn.Linear(f, k)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


MLPS = {
    "gated": lambda: Gated(48, 80),
    "gelu gated": lambda: Gated(48, 80, bias=True, kind="gelu"),
    "tanh gated": lambda: Gated(48, 80, kind="tanh"),
    "fused": lambda: Fused(48, 80),
    "plain": lambda: Plain(48, 80),
}


def llama_block(name="coat", seed=0, **config):
    torch.manual_seed(seed)
    c = models.Config(**{"dim": 64, "heads": 4, "kv_heads": 2, "ffn": 96} | config)
    return qv.convert(Block(c), RECIPES.get(name, name))


def positions(length, head_dim=16):
    return models.layers.rotary(head_dim, length, 1e4)


def run(block, x, autocast=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return block(x, positions(x.shape[1]))


def gradients(block):
    return [
        p.grad.dequantize() if isinstance(p.grad, ScaledTensor) else p.grad
        for p in block.parameters()
    ]
