"""ReadOnlyTensor: decoded values; a write that would be lost is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten


def is_view(func) -> bool:
    """Whether an op's results share the memory of its arguments."""
    infos = [r.alias_info for r in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def written(func, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The tensors that an op writes. torch's collectives declare none; all except `send` write
    their first argument."""
    if func.namespace == "c10d":
        yield from () if "send" in func._schema.name else tree_leaves(args[0])
        return
    specs = func._schema.arguments
    given = [*zip(specs, args, strict=False), *((s, kwargs.get(s.name)) for s in specs)]
    for spec, value in given:
        # torch's fused optimizers write gradients only where they unscale them.
        unscaled = spec.name != "grads" or kwargs.get("grad_scale") is not None
        if spec.alias_info is not None and spec.alias_info.is_write and unscaled:
            yield from tree_leaves(value)


def _refusal(op: str) -> str:
    return (
        f"{op}: these are decoded values of a ScaledTensor, and writing to them would not change "
        "it. Write to the parameter (param.copy_(x), param[i] = x; state_dict(keep_vars=True) has "
        "the parameters), copy_ to the whole value of a state_dict, or write to a clone()"
    )


def _refused(op: str):
    def refuse(self, *args):
        raise RuntimeError(_refusal(op))

    return refuse


class ReadOnlyTensor(torch.Tensor):
    """The decoded values of a ScaledTensor, or of a part of one, in memory of their own: what
    `state_dict()` and views that cannot share codes return.

    It reads as a plain tensor, results of ops on it are plain, its views are read-only too.
    Copies, pickles and files of it are plain tensors.

    One write takes effect, since others load models by it: copy_ to the whole of a value whose
    `source` is a ScaledTensor writes to both. The source rounds it as by source.copy_; the value
    has the numbers as they were given, so that load_state_dict finds the codes that were saved.

    Raises:
        RuntimeError: another write, named with the op.
    """

    values: Tensor
    source: Tensor | None

    @staticmethod
    def __new__(cls, values: Tensor, source: Tensor | None = None):
        out = torch.Tensor._make_subclass(cls, values)
        out.values, out.source = values, source
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = args[0] if func is aten.copy_.default else None
        if isinstance(target, ReadOnlyTensor) and target.source is not None:
            return target.assign_(*_values(args[1:]), **kwargs)
        if any(isinstance(t, ReadOnlyTensor) for t in written(func, args, kwargs)):
            raise RuntimeError(_refusal(func.name()))
        out = func(*_values(args), **_values(kwargs))
        if not is_view(func):
            return out
        whole = func in (aten.detach.default, aten.alias.default)
        source = args[0].source if whole else None
        return tree_map_only(Tensor, lambda t: ReadOnlyTensor(t, source), out)

    @torch.no_grad()
    def assign_(self, value: Tensor, non_blocking: bool = False) -> ReadOnlyTensor:
        """Copy `value` to the source, and here if that succeeded."""
        self.source.copy_(value, non_blocking)
        if not self.source.is_inference():  # torch counts no writes below autograd
            torch.autograd.graph.increment_version(self.source)
        self.values.copy_(value, non_blocking)
        return self

    apply_, map_, map2_ = _refused("apply_"), _refused("map_"), _refused("map2_")
    __dlpack_c_exchange_api__ = None  # would hand out memory that can be written

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value) -> None:
        raise RuntimeError(_refusal(".data ="))

    def numpy(self, *, force: bool = False):
        """A read-only NumPy array of the same memory."""
        if self.requires_grad and not force:
            raise RuntimeError("numpy: the tensor requires grad; use detach().numpy()")
        array = self.values.numpy(force=force)
        array.flags.writeable = False
        return array

    def __dlpack__(self, *, copy=None, **kwargs):
        """A copy where one is asked for. Raises BufferError otherwise: torch hands out memory that
        can be written even where the exporter marks it read-only."""
        if copy is not True:
            raise BufferError(
                "__dlpack__: these are decoded values of a ScaledTensor, which others must not "
                "write; pass a clone(), or ask for a copy: from_dlpack(t, copy=True)"
            )
        return self.values.clone().__dlpack__(**kwargs)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        if not self.is_leaf:
            raise RuntimeError("deepcopy: only leaf tensors can be copied deeply; use detach()")
        return copy.deepcopy(self.values, memo)

    def __reduce_ex__(self, protocol):
        return self.values.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents=None):
        return f"ReadOnlyTensor({self.values!r})"


def _values(arguments):
    return tree_map_only(ReadOnlyTensor, lambda t: t.values, arguments)
