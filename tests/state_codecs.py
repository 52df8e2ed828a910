"""Optimizers of tests by state codec, and what they keep."""

import dataclasses

from helpers import parts_of

from quaver import recipe

COAT = recipe.get("coat")


def with_states(exp_avg, exp_avg_sq=None, **options):
    """A recipe for plain parameters."""
    return dataclasses.replace(
        COAT, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq or exp_avg, linear=None, **options
    )


def state_of(optimizer, p):
    """Everything that a step of p may change, cloned."""
    tensors = [p.detach(), *(v for _, v in sorted(optimizer.state[p].items()))]
    return [part for t in tensors for part in parts_of(t)]
