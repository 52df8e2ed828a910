"""Tensors in memory whose every byte is known, so that a write outside of them shows."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def place(values: Tensor, stride=None, first: int = 0, behind: int = 0) -> Tensor:
    """A copy of values with these strides, from byte `first` of new memory on, which ends `behind`
    bytes after it. Neither need suit the dtype. The tensor keeps its memory as `.memory`."""
    if not values.numel() or values.element_size() not in _BITS:
        return values.clone()
    stride = values.contiguous().stride() if stride is None else stride
    last = sum((n - 1) * s for n, s in zip(values.shape, stride, strict=True))
    size = first + (last + 1) * values.element_size() + behind
    memory = torch.frombuffer(bytearray(b"\xa5" * size), dtype=torch.uint8)
    t = _within(memory, values.dtype, values.shape, stride, first)
    raw = _BITS[values.element_size()]
    t.view(raw).copy_(values.contiguous().view(raw))
    return t


def expanded(t: Tensor) -> Tensor:
    """The first row of t in place of all."""
    row = place(t[:1].contiguous(), None, 64, 64)
    rows = row.expand(t.shape)
    if hasattr(row, "memory"):
        rows.memory, rows.first = row.memory, row.first
    return rows


def clone(value, made=None):
    """A copy of arguments with the same strides at the same place of memory of their own. A tensor
    that is there twice is so in the copy."""
    made = {} if made is None else made
    if isinstance(value, (list, tuple)):
        return [clone(v, made) for v in value]
    if not isinstance(value, Tensor):
        return value
    if id(value) not in made:
        made[id(value)] = _clone_tensor(value)
    return made[id(value)]


def _clone_tensor(value):
    if not hasattr(value, "memory"):
        return value.clone()
    memory = torch.frombuffer(bytearray(value.memory.numpy().tobytes()), dtype=torch.uint8)
    return _within(memory, value.dtype, value.shape, value.stride(), value.first)


def wrote_outside(before: Tensor, after: Tensor, written: bool) -> bool:
    """Whether bytes of the memory changed that are none of the tensor's, or, if it is an argument
    that is only read, any."""
    if not hasattr(after, "memory"):
        return False
    differ = before.memory != after.memory
    if written:
        own = torch.zeros_like(after.memory)
        raw = _BITS[after.element_size()]
        _within(own, raw, after.shape, after.stride(), after.first).fill_(
            -1 if raw.is_signed else 1
        )
        differ &= own == 0
    return bool(differ.any())


def _within(memory: Tensor, dtype: torch.dtype, shape, stride, first: int) -> Tensor:
    count = (len(memory) - first) // dtype.itemsize
    flat = torch.frombuffer(memory.numpy(), dtype=dtype, offset=first, count=count)
    t = flat.as_strided(shape, stride)
    t.memory, t.first = memory, first
    return t
