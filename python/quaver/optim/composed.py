"""The step of parameters whose first moment is a Subspace.

    m, v <- moments of g;  w <- (1 - lr decay) w - lr (numerator / (sqrt(v / (1 - beta2^t)) + eps))

in torch's ops, in float32, one parameter at a time. Nothing is read back from the device, except
that a refresh of a subspace, once in its `every` steps, looks at whether the step is skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import recipe
from . import rounding, subspace
from .base import Item
from .subset import SubsetSums, matrix_shape


class ComposedStep:
    """Steps parameters by a recipe whose first moment is a Subspace, beside a SubsetNorm or an f32
    or bf16 average."""

    def __reduce__(self):  # without the host's counts, which are read again
        return ComposedStep, (self.rules,)

    def __init__(self, rules: recipe.Recipe):
        self.rules = rules
        # Host copies of the age and refreshes in `counts`, which the device has: they decide when
        # a refresh is due, and hold for one version of one tensor, since loading writes others.
        self._due: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def forget(self) -> None:
        """After states were loaded: the counts are read again."""
        self._due.clear()

    @torch.no_grad()
    def step(self, item: Item, usable: Tensor, hyper: Tensor, how: str) -> None:
        """Steps one item, or changes nothing where `usable` (bool, 0-D) is false. `hyper` is the
        float64 row lr, beta1, beta2, eps, weight_decay; `how` the rounding of the weight."""
        p, state = item.parameter, item.state
        lr, beta1, beta2, eps, decay = hyper.unbind()
        taken = state["step"]
        t = (taken + 1).double()
        grad = item.grad.float()
        grad = torch.where(usable, grad, torch.zeros((), device=p.device)).view(matrix_shape(p))
        numerator = self._subspace(item, grad, usable, beta1, t)
        second = state["exp_avg_sq"]
        if isinstance(self.rules.exp_avg_sq, recipe.SubsetNorm):
            sums = torch.where(usable, item.sums, 0.0)
            v = SubsetSums(self.rules.exp_avg_sq).spread(_average_(second, sums, usable, beta2), p)
        else:
            v = _average_(second, grad.square(), usable, beta2)
        denominator = v.sqrt() * (1 - beta2**t).rsqrt().float() + eps.float()
        old = rounding.master(p, state.get("remainder"))
        new = (1 - lr * decay).float() * old
        new -= lr.float() * (numerator / denominator).view(p.shape)
        rounding.store_(
            p, torch.where(usable, new, old), how, state.get("remainder"), item.ordinal, taken
        )
        taken += usable

    def _subspace(self, item: Item, grad: Tensor, usable: Tensor, beta1: Tensor,
                  t: Tensor) -> Tensor:  # fmt: skip
        rule, state = self.rules.exp_avg, item.state
        self._refresh(item, grad, usable)
        basis, moment, counts = state["basis"], state["exp_avg"], state["counts"]
        projected = subspace.project(basis, grad)
        average = _average_(moment, projected, usable, beta1)
        correction = (1 - beta1 ** counts[subspace.UPDATES].clamp(min=1).double()).float()
        if rule.paper_bias:
            correction = (1 - beta1**t).float()
            return (grad + subspace.lift(basis, average - projected, grad.shape)) / correction
        return grad + subspace.lift(basis, average / correction - projected, grad.shape)

    def _refresh(self, item: Item, grad: Tensor, usable: Tensor) -> None:
        rule, p, counts = self.rules.exp_avg, item.parameter, item.state["counts"]
        if p.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "AdamW: a step with a Subspace moment cannot be captured, because the host decides "
                "when the subspace is chosen anew"
            )
        version, age, refreshes = self._due.get(counts, (None, 0, 0))
        if version != counts._version:
            age, _, refreshes = counts.tolist()
        if age % rule.every == 0 and bool(usable):
            subspace.refresh_(rule, item.state, grad, item.ordinal, refreshes)
            age, refreshes = 1, refreshes + 1
        elif age % rule.every:
            age += 1
        # Filled, because a copy from the host would wait for the device.
        counts[subspace.AGE].fill_(age)
        counts[subspace.REFRESHES].fill_(refreshes)
        counts[subspace.UPDATES] += usable
        self._due[counts] = (counts._version, age, refreshes)


def _weights(usable: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """float32 factors of the old value and of the new one; 1 and 0 where nothing is to change."""
    one, none = torch.ones_like(beta), torch.zeros_like(beta)
    return torch.where(usable, beta, one).float(), torch.where(usable, 1 - beta, none).float()


def _average_(value: Tensor, x: Tensor, usable: Tensor, beta: Tensor) -> Tensor:
    """The moving average of x in `value` (float32 or bfloat16), updated; float32, of x's shape."""
    keep, add = _weights(usable, beta)
    new = keep * value.float().view(x.shape) + add * x
    value.copy_(new.view(value.shape))
    return new
