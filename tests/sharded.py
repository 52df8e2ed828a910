"""A model of ragged sizes that tests shard by FSDP2, its steps, and states put together again."""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_same, bits
from torch import nn

import quaver as qv
from quaver import models, recipe
from quaver.checkpoint.saving import entries
from quaver.models.config import Config
from quaver.tensor import local

# No size here is a multiple of 16, of 3 or of 4, and the head has fewer rows than some have ranks.
CONFIG = Config(vocab=50, dim=40, layers=2, heads=4, kv_heads=2, ffn=70, context=16)
SEQUENCES = 12  # in a global batch
LR = 3e-3
_O2 = recipe.get("fp8lm-o2")
CURRENT = replace(_O2, linear=replace(_O2.linear, scaling="current"))


class Model(nn.Module):
    """A small Llama with a converted layer outside its blocks, of fewer rows than ranks."""

    def __init__(self):
        super().__init__()
        self.llama = models.build(CONFIG)
        self.extra = nn.Linear(CONFIG.vocab, 2)

    def forward(self, tokens):
        logits = self.llama(tokens)
        return logits, self.extra(logits)


def build(name="fp8lm-o2"):
    torch.manual_seed(0)
    return qv.convert(Model(), name, skip=("llama.lm_head",))  # not the small layer


def loss_of(model, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        logits, extra = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    return loss + extra.float().square().mean()


def batch(step):
    tokens = torch.randint(
        0, CONFIG.vocab, (SEQUENCES, 13), generator=torch.Generator().manual_seed(step)
    )
    tokens[:, 1::2] = tokens[:, :-1:2]  # something to learn
    return tokens


def train(model, optimizer, steps, rank=0, size=1):
    """Losses of the global batches; gradients are sums, so losses are shares."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batch(step).chunk(size)[rank]) / size
        loss.backward()
        qv.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = loss.detach()
        if size > 1:
            dist.all_reduce(loss)
        losses.append(loss.item())
    return losses


def adamw(model, name="fp8lm-o2"):
    return qv.AdamW(model.parameters(), lr=LR, recipe=name)


def here(model, optimizer):
    """This rank's part of everything that training changes, {name: plain tensor}."""
    found = {}
    for name, p in model.named_parameters():
        values = {"": p} | optimizer.state[p]
        for key, value in values.items():
            found |= {
                n: local(t).detach().clone() for n, t in entries(f"{name}.{key}", value).items()
            }
    return found


def join(parts):
    """The whole of what each rank has `here`."""
    whole = {}
    for name, first in parts[0].items():
        if first.dim():
            raw = torch.cat([bits(part[name]) for part in parts])
            whole[name] = raw.view(first.dtype)
            continue
        for part in parts:
            assert_same(part[name], first, name)
        whole[name] = first
    return whole


def assert_same_state(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same(got[name], value, name)
