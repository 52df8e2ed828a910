"""ScaledTensor: the one low-precision tensor. x ~= scale * q.

Weights, weight gradients and optimizer states are ScaledTensors. To autograd, `.grad`,
`state_dict` and `torch.compile` it is a tensor of its logical dtype; an op that does not know it
gets its decoded value.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

GROUP = 128  # flat elements that share a scale in the granularities "group" and "expand"

FLAT = ("group", "expand")

QDTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16)

# What tensor_ops.py knows, by aten op; NotImplemented of a function stands for "not this time".
KNOWN = {}


def is_sharded(t) -> bool:
    """Whether `t` is a DTensor. Whoever has one has imported them; that takes half a second."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(t, distributed.DTensor)


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return t._local_tensor if is_sharded(t) else t


def _scale_shape(qdata: Tensor, granularity: str, block: int) -> tuple[int, ...]:
    *rows, columns = qdata.shape or (1,)
    if granularity == "tensor":
        return ()
    if granularity == "row":
        return (*rows, 1)
    if granularity == "block" and block > 0:
        return (*rows, -(-columns // block))
    if granularity in FLAT and block == GROUP:
        return (-(-qdata.numel() // GROUP),)
    raise ValueError(
        f'ScaledTensor: granularity must be "tensor", "row", "block", "group" or "expand", got '
        f"{granularity!r} with block {block}"
    )


class ScaledTensor(torch.Tensor):
    """A tensor stored as low-precision `qdata` and f32 decode `scale`s.

    Args:
        qdata: float8_e4m3fn, float8_e5m2, float16 or bfloat16 codes, of any shape.
        scale: float32 decode multiplier: 0-D for granularity "tensor", [..., 1] for "row",
            [..., ceil(cols / block)] for "block". Optimizer states also come as "group" and
            "expand", [ceil(numel / 128)], where "expand" is not linear (ops.encode_state).
        amax: float32 largest magnitude of the values that were encoded, shaped like scale, or None.
            Encoding saturates, so a non-finite amax is the only trace of an infinity.
        dtype: the logical dtype that other code sees.
        col: the codes of the matrix [rows, last axis], transposed and padded with zeros to
            multiples of 16: the layout in which a weight gradient reads them. Whoever cast an
            activation, or the gradient of one, wrote both; a linear layer then casts nothing.

    Raises:
        TypeError: a dtype that is none of the above.
        ValueError: an unknown granularity, or a scale that does not fit it.
    """

    qdata: Tensor
    scale: Tensor
    amax: Tensor | None
    col: Tensor | None

    @staticmethod
    def __new__(
        cls,
        qdata,
        scale,
        amax=None,
        dtype=torch.float32,
        granularity="tensor",
        block=128,
        col=None,
    ):
        return torch.Tensor._make_wrapper_subclass(
            cls, qdata.size(), strides=qdata.stride(), dtype=dtype, device=qdata.device
        )

    def __init__(
        self,
        qdata,
        scale,
        amax=None,
        dtype=torch.float32,
        granularity="tensor",
        block=128,
        col=None,
    ):
        if qdata.dtype not in QDTYPES:
            raise TypeError(f"ScaledTensor: qdata must be one of {QDTYPES}, got {qdata.dtype}")
        if scale.dtype != torch.float32:
            raise TypeError(f"ScaledTensor: scale must be float32, got {scale.dtype}")
        wanted = _scale_shape(qdata, granularity, block)
        if scale.shape != wanted and (granularity != "tensor" or scale.numel() != 1):
            raise ValueError(
                f"ScaledTensor: wanted scales {tuple(wanted)} for granularity {granularity!r}, got "
                f"{tuple(scale.shape)}"
            )
        self.qdata = qdata
        self.scale = scale
        self.amax = amax
        self.granularity = granularity
        self.block = block
        self.col = col
        self.part = False  # a slice of another ScaledTensor, whose scale it shares
        self.gathered = False  # by FSDP2, which frees the codes and fills them again

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded values as a plain tensor of `dtype` (default: the logical dtype)."""
        dtype = dtype or self.dtype
        if self.granularity in FLAT:
            expand = self.granularity == "expand"
            return torch.ops.quaver.decode_state(self.qdata, self.scale, expand).to(dtype)
        direct = dtype in (torch.float32, torch.float16, torch.bfloat16)
        out = torch.ops.quaver.dequantize(
            self.qdata,
            self.scale,
            dtype if direct else torch.float32,
            self.granularity,
            self.block,
        )
        return out if direct else out.to(dtype)

    def _like(self, qdata, scale=None, amax=None, dtype=None, col=None) -> ScaledTensor:
        """This tensor's kind around other data."""
        return ScaledTensor(
            qdata,
            self.scale if scale is None else scale,
            self.amax if amax is None else amax,
            dtype or self.dtype,
            self.granularity,
            self.block,
            col,
        )

    def _map(self, function, dtype=None) -> ScaledTensor:
        """`function` on every tensor inside."""
        amax, col = (None if t is None else function(t) for t in (self.amax, self.col))
        return self._like(function(self.qdata), function(self.scale), amax, dtype, col)

    def refresh_copies(self) -> ScaledTensor:
        """To be called after the contents changed: a weight's FP8 copies follow it."""
        self.col = None
        copies = self.__dict__.get("fp8_weight")
        if copies is not None:
            copies.rewrite(self)
        return self

    def _shares_its_scale(self) -> bool:
        """Whether the tensor that this is a slice of holds anything else. (The padding of FSDP2's
        shards is zero.)"""
        whole = torch.empty(0, dtype=torch.uint8, device=self.device)
        whole.set_(self.qdata.untyped_storage())
        mine = self.qdata.reshape(-1).view(torch.uint8)
        return bool(whole.count_nonzero() != mine.count_nonzero())

    def _encode_(self, value: Tensor) -> ScaledTensor:
        """Overwrite the contents with `value`, with a fresh just-in-time scale; a slice keeps the
        scale, since the rest of its tensor has it too, unless that is zero.

        Raises ValueError if a value does not fit into a slice's scale.
        """
        tied = self.part and self._shares_its_scale()
        if self.qdata.dtype == torch.bfloat16:
            self.qdata.copy_(value)
            self.scale.fill_(1.0)
            if self.amax is not None:
                self.amax.copy_(self.qdata.abs().amax() if self.numel() else 0.0)
            return self.refresh_copies()
        value = value.to(torch.float32) if value.dtype == torch.float64 else value
        if self.granularity in FLAT:
            value, expand = value.expand(self.shape), self.granularity == "expand"
            q, scale = torch.ops.quaver.encode_state(value, self.qdata.dtype, expand)
            self.qdata.copy_(q)
            self.scale.copy_(scale)
            return self
        q, scale, amax = torch.ops.quaver.quantize(
            value.expand(self.shape).contiguous(),
            self.qdata.dtype,
            self.scale if tied else None,
            None,
            self.granularity,
            self.block,
            True,
            False,
            0,
        )
        if tied and amax > self.scale * torch.finfo(self.qdata.dtype).max:
            raise ValueError(
                f"ScaledTensor: {amax.item()} does not fit into a slice with scale "
                f"{self.scale.item()}; write the whole tensor"
            )
        self.qdata.copy_(q)
        self.scale.copy_(scale)
        if self.amax is not None:
            self.amax.copy_(torch.maximum(amax, self.amax) if tied else amax)
        return self.refresh_copies()

    # FSDP2's extension of its all-gather: it finds these on the shard. Imported late, because what
    # FSDP2 needs of this class is here and what it does is there.
    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        from .distributed.fsdp import pre_all_gather

        return pre_all_gather(self, mesh, outer_size, module)

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        from .distributed.fsdp import post_all_gather

        return post_all_gather(outputs, metadata, param_dtype, out)

    def __setitem__(self, index, value) -> None:
        """Decodes, writes and encodes anew. torch's own would write into a decoded copy."""
        plain = self.detach().dequantize()
        plain[index] = value
        self.copy_(plain)

    def __getstate__(self):
        """For files and copies; the FP8 copies of a weight are a function of it."""
        return {k: v for k, v in self.__dict__.items() if k != "fp8_weight"}

    def __tensor_flatten__(self):
        optional = [name for name in ("amax", "col") if getattr(self, name) is not None]
        return ["qdata", "scale", *optional], (self.dtype, self.granularity, self.block)

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        dtype, granularity, block = context
        return ScaledTensor(
            inner["qdata"],
            inner["scale"],
            inner.get("amax"),
            dtype,
            granularity,
            block,
            inner.get("col"),
        )

    def __repr__(self, *, tensor_contents=None):
        return (
            f"ScaledTensor({tuple(self.shape)}, {self.dtype} as {self.qdata.dtype}, "
            f"{self.granularity} scale, device={self.device})"
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = KNOWN.get(func)
        if known is not None:
            out = known(func, *args, **kwargs)
            if out is not NotImplemented:
                return out
        return _decoded(func, args, kwargs)

    # Without this, torch would wrap every result in the subclass again.
    __torch_function__ = torch._C._disabled_torch_function_impl


def _decoded(func, args, kwargs):
    """Any op: on the decoded values, written back where the op writes."""
    written = []

    def decode(argument, value):
        writes = argument.alias_info is not None and argument.alias_info.is_write

        def decode_one(t):
            plain = t.dequantize()
            if writes:
                written.append((t, plain))
            return plain

        return tree_map_only(ScaledTensor, decode_one, value)

    schema = func._schema.arguments
    by_name = {s.name: s for s in schema}
    plain_args = [decode(s, a) for s, a in zip(schema, args, strict=False)]
    out = func(*plain_args, **{k: decode(by_name[k], v) for k, v in kwargs.items()})
    targets = {}
    for target, plain in written:
        target._encode_(plain)
        targets[id(plain)] = target
    return tree_map_only(Tensor, lambda t: targets.get(id(t), t), out) if targets else out


torch.serialization.add_safe_globals([ScaledTensor])
