"""ScaledTensor: the one low-precision tensor. x ~= scale * q.

Weights, weight gradients and optimizer states are ScaledTensors. To autograd, `.grad`,
`state_dict` and `torch.compile` it is a tensor of its logical dtype; an op that does not know it
gets its decoded value.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .layout import Layout

# Handlers of tensor_ops.py by aten op; a handler returns NotImplemented to fall back to decoded
# values.
KNOWN = {}

LOGICAL = {str(t).removeprefix("torch."): t for t in
           (torch.float32, torch.float64, torch.bfloat16, torch.float16)}  # fmt: skip


def is_sharded(t) -> bool:
    """Whether `t` is a DTensor. Looked up in sys.modules: importing DTensor takes half a second,
    and a caller that has a DTensor has imported it."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(t, distributed.DTensor)


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return t._local_tensor if is_sharded(t) else t


def plain_tensors(value) -> list[Tensor]:
    """The plain tensors that a tensor consists of here: itself, or those inside a wrapper subclass;
    none for None."""
    if value is None:
        return []
    value = local(value)
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [inner for name in names for inner in plain_tensors(getattr(value, name))]
    return [value]


class ScaledTensor(torch.Tensor):
    """A tensor stored as low-precision `qdata` and f32 decode `scale`s.

    Args:
        qdata: codes of a layout's dtype, of any shape.
        scale: float32 decode multipliers, shaped as `layout.scale_shape` says.
        amax: float32 largest magnitude of the values that were encoded, shaped like scale, or None.
            Encoding saturates, so a non-finite amax is the only trace of an infinity.
        dtype: the logical dtype that other code sees.
        layout: default: one scale for the tensor, in the format of qdata's dtype. The attribute is
            `qlayout`, since `layout` is torch's (strided or sparse).
        qt: the codes of the matrix [rows, last axis], transposed and padded with zeros to
            multiples of 16: the layout in which a weight gradient reads them. An op that casts an
            activation, or the gradient of one, writes both; a linear layer then casts nothing.

    Raises:
        TypeError: a dtype that is none of the above.
        ValueError: a scale that does not fit the layout.
    """

    qdata: Tensor
    scale: Tensor
    amax: Tensor | None
    qlayout: Layout
    qt: Tensor | None
    is_transient = False  # FSDP2 frees and refills the codes of an all-gathered weight
    sequence_input = None  # tensor_parallel/linear.py's Input, on a gathered activation

    @staticmethod
    def __new__(cls, qdata, scale, amax=None, dtype=torch.float32, layout=None, qt=None):
        return torch.Tensor._make_wrapper_subclass(
            cls, qdata.size(), strides=qdata.stride(), dtype=dtype, device=qdata.device
        )

    def __init__(self, qdata, scale, amax=None, dtype=torch.float32, layout=None, qt=None):
        layout = Layout.of(qdata.dtype) if layout is None else layout
        if qdata.dtype != layout.dtype:
            raise TypeError(f"ScaledTensor: wanted {layout.dtype} for {layout}, got {qdata.dtype}")
        if scale.dtype != torch.float32:
            raise TypeError(f"ScaledTensor: scale must be float32, got {scale.dtype}")
        wanted = layout.scale_shape(qdata.shape)
        if scale.shape != wanted and (layout.grain != "tensor" or scale.numel() != 1):
            raise ValueError(
                f"ScaledTensor: wanted scales {wanted} for {layout}, got {tuple(scale.shape)}"
            )
        self.qdata = qdata
        self.scale = scale
        self.amax = amax
        self.qlayout = layout
        self.qt = qt
        self.part = False  # a slice of another ScaledTensor, whose scale it shares

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it is stored as: "qdata", "scale" and, where there is one, "amax".
        (`qt` follows from them.)"""
        parts = {"qdata": self.qdata, "scale": self.scale}
        return parts if self.amax is None else {**parts, "amax": self.amax}

    def store_(self, qdata: Tensor, scale: Tensor, amax: Tensor | None) -> ScaledTensor:
        """Replace the tensors that it is stored as: the same shape and grain in another format or
        other memory. Its FP8 copies are the caller's to rewrite."""
        self.qlayout = replace(self.qlayout, format=Layout.of(qdata.dtype).format)
        self.qdata, self.scale, self.amax, self.qt = qdata, scale, amax, None
        return self

    def description(self) -> dict:
        """What `rebuild` needs beside the parts, as JSON values."""
        return {"dtype": str(self.dtype).removeprefix("torch."), **asdict(self.qlayout)}

    @classmethod
    def rebuild(cls, parts: dict[str, Tensor], description: dict) -> ScaledTensor:
        """The tensor of which `parts()` and `description()` came.

        Raises TypeError or ValueError where they do not describe a ScaledTensor.
        """
        fields = dict(description)
        dtype = fields.pop("dtype", None)
        if dtype not in LOGICAL:
            raise ValueError(
                f"ScaledTensor: dtype must be one of {', '.join(LOGICAL)}, got {dtype!r}"
            )
        return cls(
            parts["qdata"], parts["scale"], parts.get("amax"), LOGICAL[dtype], Layout(**fields)
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded values as a plain tensor of `dtype` (default: the logical dtype)."""
        dtype = dtype or self.dtype
        if self.qlayout.grain == "flat":
            values = torch.ops.quaver.decode_state(self.qdata, self.scale, self.qlayout.expand)
            return values.to(dtype)
        direct = dtype in (torch.float32, torch.float16, torch.bfloat16)
        out = torch.ops.quaver.dequantize(
            self.qdata,
            self.scale,
            dtype if direct else torch.float32,
            self.qlayout.grain,
            self.qlayout.block,
        )
        return out if direct else out.to(dtype)

    def _like(self, qdata, scale=None, amax=None, dtype=None, qt=None) -> ScaledTensor:
        """This tensor's kind around other data."""
        return ScaledTensor(
            qdata,
            self.scale if scale is None else scale,
            self.amax if amax is None else amax,
            dtype or self.dtype,
            self.qlayout,
            qt,
        )

    def _map(self, function, dtype=None) -> ScaledTensor:
        """`function` on every tensor inside."""
        amax, qt = (None if t is None else function(t) for t in (self.amax, self.qt))
        return self._like(function(self.qdata), function(self.scale), amax, dtype, qt)

    def refresh_copies(self) -> ScaledTensor:
        """To be called after the contents changed: a weight's FP8 copies follow it."""
        self.qt = None
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
        if self.qlayout.grain == "flat":
            value, expand = value.expand(self.shape), self.qlayout.expand
            q, scale = torch.ops.quaver.encode_state(value, self.qdata.dtype, expand)
            self.qdata.copy_(q)
            self.scale.copy_(scale)
            return self
        q, scale, amax = torch.ops.quaver.quantize(
            value.expand(self.shape).contiguous(),
            self.qdata.dtype,
            self.scale if tied else None,
            None,
            self.qlayout.grain,
            self.qlayout.block,
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

    # FSDP2's extension of its all-gather: it looks for these on the shard.

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """The codes to gather: those that `module` multiplies by, or for other modules those
        stored, so that it gets decoded values."""
        encode = getattr(module, "all_gather_codes", None)
        codes, scale = (self.qdata, self.scale) if encode is None else encode(self)
        missing = -(-outer_size[0] // mesh.size()) - codes.shape[0]
        if missing:  # the last ranks hold fewer rows, or none
            padding = (0, 0) * (codes.dim() - 1) + (0, missing)
            codes = F.pad(codes.view(torch.uint8), padding).view(codes.dtype)
        return (codes,), scale

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        """The weight of the gathered codes; later gathers fill the same memory."""
        (codes,), scale = outputs, metadata
        if out is not None:
            out.scale.copy_(scale)
            return None
        weight = ScaledTensor(codes, scale.clone(), None, param_dtype)
        weight.is_transient = codes.dtype != torch.float16
        return weight, ()

    def __setitem__(self, index, value) -> None:
        """Decodes, writes and encodes anew. torch's own would write into a decoded copy."""
        plain = self.detach().dequantize()
        plain[index] = value
        self.copy_(plain)

    def __getstate__(self):
        """For files and copies; the FP8 copies of a weight are a function of it."""
        return {k: v for k, v in self.__dict__.items() if k != "fp8_weight"}

    def __tensor_flatten__(self):
        names = [*self.parts()] if self.qt is None else [*self.parts(), "qt"]
        return names, (self.dtype, self.qlayout)

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        amax, qt = inner.get("amax"), inner.get("qt")
        return ScaledTensor(inner["qdata"], inner["scale"], amax, *context, qt)

    def __repr__(self, *, tensor_contents=None):
        return (
            f"ScaledTensor({tuple(self.shape)}, {self.dtype} as {self.qlayout}, "
            f"device={self.device})"
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


torch.serialization.add_safe_globals([ScaledTensor, Layout])
