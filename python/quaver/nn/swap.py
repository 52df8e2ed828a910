"""Replaces the class of a module by a subclass of it, and takes that back."""

from __future__ import annotations

import functools

from torch import nn


class Swapped(nn.Module):
    """A module whose class `convert` replaced: its own class still, with another forward."""

    def __reduce_ex__(self, protocol):
        mixin, base = type(self).__bases__
        return _blank, (mixin, base), self.__dict__

    @staticmethod
    def members(base: type) -> dict:
        """What the subclass of `base` defines beside the mixin."""
        return {}


@functools.cache
def swapped_class(mixin: type, base: type) -> type:
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), members | mixin.members(base))


def swap(module: nn.Module, mixin: type) -> None:
    module.__class__ = swapped_class(mixin, type(module))


def swap_back(module: nn.Module) -> None:
    mixin, base = type(module).__bases__
    if not issubclass(mixin, Swapped):
        raise ValueError(
            f"restore: {base.__name__} was wrapped by {mixin.__name__} after convert; restore first"
        )
    module.__class__ = base


def _blank(mixin: type, base: type) -> nn.Module:
    cls = swapped_class(mixin, base)
    return cls.__new__(cls)
