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
        """Attributes of the subclass of `base` beside the mixin's."""
        return {}


@functools.cache
def swapped_class(mixin: type, base: type) -> type:
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), members | mixin.members(base))


def swap(module: nn.Module, mixin: type) -> None:
    module.__class__ = swapped_class(mixin, type(module))


def swap_back(module: nn.Module) -> None:
    module.__class__ = type(module).__bases__[1]


def is_wrapped(module: nn.Module) -> bool:
    """Whether something (FSDP2, say) replaced the class of a swapped module again."""
    return isinstance(module, Swapped) and not issubclass(type(module).__bases__[0], Swapped)


def _blank(mixin: type, base: type) -> nn.Module:
    cls = swapped_class(mixin, base)
    return cls.__new__(cls)
