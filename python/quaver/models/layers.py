"""Code that both families share: attention, initialisation and the check of the input."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import rotate

__all__ = ["Attention", "Decoder", "rotary"]


def rotary(head_dim, context, theta):
    """cos and sin of rotary positions, f32 [context, head_dim]. The halves hold the same angles;
    the first half of sin is negative, as `turn` takes it."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency)
    return torch.cat((angle.cos(),) * 2, dim=-1), torch.cat((-angle.sin(), angle.sin()), dim=-1)


def turn(parts, cos, sin, turned, inverse=False):
    """The heads of `parts`, each [batch, length, heads, head_dim], side by side: the first `turned`
    by their positions, or back (ops.rotate). The products are taken in f32: bf16 cosines lose the
    far positions. FSDP2 casts a block's inputs, cos and sin too. The op has no derivative of its
    own: a backward that is differentiated again takes torch's."""
    cos, sin = cos.float(), sin.float()
    again = torch.is_grad_enabled() and any(t.requires_grad for t in parts)
    if parts[0].dtype in (torch.float32, torch.bfloat16) and not again:
        return rotate(parts, cos, sin, turned, inverse)
    x = torch.cat(parts, dim=2)
    first, half = x[:, :, :turned], x.shape[-1] // 2
    swapped = torch.cat((first[..., half:], first[..., :half]), dim=-1)
    first = first * cos[:, None] + swapped * (-sin if inverse else sin)[:, None]
    return torch.cat((first.to(x.dtype), x[:, :, turned:]), dim=2)


class _Turned(torch.autograd.Function):
    """q and k of a projection, turned by their position, and v: [batch, heads, length, head_dim]
    each, in memory of their own, since attention saves them and views would keep qkv alive. One
    kernel each way; autograd's own steps through slices, products and sums are 38."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, split, head_dim):
        batch, length, _ = qkv.shape
        ctx.save_for_backward(cos, sin)
        heads = [width // head_dim for width in split]
        ctx.shape, ctx.turned = qkv.shape, heads[0] + heads[1]
        parts = turn([qkv.view(batch, length, -1, head_dim)], cos, sin, ctx.turned)
        return tuple(part.transpose(1, 2) for part in parts.split(heads, dim=2))

    @staticmethod
    def backward(ctx, *grads):
        parts = [grad.transpose(1, 2) for grad in grads]
        joint = turn(parts, *ctx.saved_tensors, ctx.turned, inverse=True)
        return joint.view(ctx.shape), None, None, None, None


class Attention(nn.Module):
    """Causal self-attention. One `qkv` projection, so that its input is cast to FP8 once."""

    def __init__(self, config, bias):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        kv = self.kv_heads * self.head_dim
        self.split = (config.dim, kv, kv)
        self.qkv = nn.Linear(config.dim, sum(self.split), bias=bias)
        self.out = nn.Linear(config.dim, config.dim, bias=bias)

    def forward(self, x, position=None):
        """x [batch, length, dim] -> the same shape. `position`: (cos, sin) to rotate by, if any."""
        batch, length, _ = x.shape
        qkv = self.qkv(x)
        if position is None:
            q, k, v = (
                part.view(batch, length, -1, self.head_dim).transpose(1, 2)
                for part in qkv.split(self.split, dim=-1)
            )
            v = v.contiguous()  # attention saves v, and a view would keep all of qkv alive
        else:
            q, k, v = _Turned.apply(qkv, *position, self.split, self.head_dim)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads
        )
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class Decoder(nn.Module):
    """The part of a decoder-only model that does not depend on the family."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.lm_head = nn.Linear(config.dim, config.vocab, bias=False)

    def initialise(self):
        """Normal 0.02; the projections that write to the residual stream are divided by
        sqrt(2 * layers), as GPT-2 does, so that the stream's variance does not grow with depth."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02
                if name.endswith((".out", ".down")):
                    std /= math.sqrt(2 * self.config.layers)
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def check(self, tokens):
        if tokens.dim() != 2 or tokens.shape[1] > self.config.context:
            raise ValueError(
                f"{type(self).__name__}: tokens must be [batch, length <= {self.config.context}], "
                f"got {list(tokens.shape)}"
            )
