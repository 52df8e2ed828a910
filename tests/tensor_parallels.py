"""Models that tests cut by tensor parallelism, and their losses and gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import FP8, randn
from torch import nn

import quaver as qv
from quaver import ScaledTensor, models, recipe
from quaver.distributed import tensor_parallel as tp
from quaver.distributed.tensor_parallel.state import join
from quaver.placement import shard_of

E4M3, E5M2 = FP8
CONFIG = models.Config(dim=64, layers=2, heads=8, kv_heads=4, ffn=96, context=64)
TOKENS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))


def plain(t):
    return t.dequantize() if isinstance(t, ScaledTensor) else t


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 48)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def mlp(name, seed=0):
    torch.manual_seed(seed)
    return qv.convert(Mlp(), recipe=name)


PLAN = {"up": tp.ColumnParallel(), "down": tp.RowParallel()}
X, DY = randn(3, 16, 64, seed=1), randn(3, 16, 48, seed=2)


def whole_gradients(model):
    """Decoded and whole, of every parameter."""
    found = {}
    for name, p in model.named_parameters():
        shard = shard_of(p)
        found[name] = plain(p.grad).clone() if shard is None else join(p.grad, shard)
    return found


def decoder(kind, name, seed=0):
    torch.manual_seed(seed)
    if kind == "huggingface":
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        model = models.build(CONFIG.replace(family=kind))
    return qv.convert(model, recipe=name)


def loss_of(model, name, tokens=TOKENS):
    dtype = recipe.get(name).autocast
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(tokens)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()), logits
