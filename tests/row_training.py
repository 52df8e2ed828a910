"""A small model under Grass, its steps, and all that they change."""

import torch
from helpers import assert_same
from torch import nn

import quaver as qv

HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.first = nn.Linear(width, 48)
        self.norm = nn.LayerNorm(48)
        self.second = nn.Linear(48, width, bias=False)
        self.lm_head = nn.Linear(width, 11, bias=False)

    def forward(self, x):
        return self.lm_head(self.second(torch.tanh(self.norm(self.first(self.embed(x))))))


def build(seed=0, recipe=None, dtype=None, **options):
    torch.manual_seed(seed)
    model = Net().to(dtype or torch.float32)
    if recipe:
        model = qv.convert(model, recipe)
    options = {"rank": 8, "every": 3, "recipe": recipe or "bf16"} | HYPER | options
    return model, qv.Grass(model, **options)


def loss_of(model, step, part=slice(None), scale=1.0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(11, (12, 5), generator=generator)[part]
    y = torch.randint(11, (12, 5), generator=generator)[part]
    return scale * nn.functional.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def everything(model, optimizer):
    values = [*model.parameters()]
    for p in model.parameters():
        values += [v for _, v in sorted(optimizer.state.get(p, {}).items())]
    parts = [v.parts() if isinstance(v, qv.ScaledTensor) else {"": v} for v in values]
    return [t.detach().clone() for found in parts for t in found.values() if t is not None]


def same(a, b):
    for x, y in zip(everything(*a), everything(*b), strict=True):
        assert_same(x, y)
