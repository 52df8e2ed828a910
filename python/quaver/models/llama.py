"""Llama: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

import torch.nn.functional as F
from torch import nn

from .layers import Attention, Decoder, rotary

__all__ = ["Llama"]


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, bias=False)
        self.norm2 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x, position):
        x = x + self.attention(self.norm1(x), position)
        return x + self.mlp(self.norm2(x))


class Llama(Decoder):
    """Llama of the sizes in `config`; parameters are f32."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        cos, sin = rotary(config.head_dim, config.context, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise()

    def forward(self, tokens):
        """tokens int64 [batch, length] -> logits [batch, length, vocab]. ValueError if too long."""
        self.check(tokens)
        length = tokens.shape[1]
        position = self.cos[:length], self.sin[:length]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, position)
        return self.lm_head(self.norm(x))
