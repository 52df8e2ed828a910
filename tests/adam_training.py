"""A small model under AdamW, its loss and steps."""

import torch
from helpers import randn
from torch import nn

import quaver as qv


def model(name="fp8lm-o2", width=48, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(32, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 16))
    return qv.convert(net, name)


def loss_of(net, seed):
    return (net(randn(64, 32, seed=seed)) - randn(64, 16, seed=seed + 1000)).square().mean()


def train(net, optimizer, steps, first=0):
    losses = []
    for i in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
