"""Rules of optimizers in subspaces, and steps by them."""

from helpers import randn
from torch import nn

import quaver as qv
from quaver import recipe

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def rules(first="f32", second="f32", **more):
    return recipe.Recipe("composed", exp_avg=first, exp_avg_sq=second, **more)


def steps(rule, shape=(24, 40), count=7, grads=None, start=None, **hyper):
    """The weight, in float32, and its state after some steps."""
    p = nn.Parameter(randn(*shape) if start is None else start.clone())
    optimizer = qv.AdamW([p], **{**HYPER, **hyper}, recipe=rule)
    for t in range(count):
        p.grad = randn(*shape, seed=t + 1).to(p.dtype) if grads is None else grads[t]
        optimizer.step()
    return p.detach(), optimizer.state[p]
