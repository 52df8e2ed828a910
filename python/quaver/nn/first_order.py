"""Autograd Functions whose gradients are constants to autograd: they go through FP8 codes."""

from __future__ import annotations

import functools

import torch

REFUSAL = (
    "quaver: FP8 layers have first derivatives by backward() only, so create_graph=True (a "
    "gradient penalty, a Hessian), is_grads_batched=True (a Jacobian with vectorize=True), forward "
    "mode and torch.func cannot go through them; call quaver.restore(model), or leave these layers "
    "to torch with convert(..., skip=...)"
)


def _is_batched(grad) -> bool:
    """Whether it is several gradients in one, of is_grads_batched=True."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


class FirstOrder(torch.autograd.Function):
    """A Function with one derivative, by backward(). Any other raises RuntimeError, because its
    gradient would lack terms."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        backward = cls.backward

        @functools.wraps(backward)
        def checked(ctx, *grads):
            if torch.is_grad_enabled() or any(map(_is_batched, grads)):  # create_graph=True
                raise RuntimeError(REFUSAL)
            return backward(ctx, *grads)

        cls.backward = staticmethod(checked)

    @classmethod
    def apply(cls, *args):
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(REFUSAL)
        # Function.apply looks for wrappers of ended transforms in every argument, for 10 us.
        return super(torch.autograd.Function, cls).apply(*args)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(REFUSAL)
