"""Code that both families share: attention, initialisation and the check of the input."""

import math

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Attention", "Decoder", "rotary"]


def rotary(head_dim, context, theta):
    """cos and sin of rotary positions, f32 [context, head_dim]; the halves hold the same angles."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x [batch, heads, length, head_dim] turned by its position. The product is taken in f32: bf16
    cosines lose the far positions."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


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
        q, k, v = (
            part.view(batch, length, -1, self.head_dim).transpose(1, 2)
            for part in self.qkv(x).split(self.split, dim=-1)
        )
        v = v.contiguous()  # attention saves v, and a view would keep all of qkv alive
        if position is not None:
            q, k = rotate(q, *position), rotate(k, *position)
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
