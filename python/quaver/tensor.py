"""ScaledTensor: the one low-precision tensor. x ~= scale * q.

Optimizer states of 8 and 16 bits are ScaledTensors, and under fp8lm-* weights of linear layers and
their gradients. To autograd, `.grad` and `torch.compile` it is a tensor of its logical dtype; an op
without a handler for it gets decoded values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from .interchange import Interchange
from .layout import Layout

# Handlers by aten op, filled by tensor_ops.py. A handler returns NotImplemented to fall back to
# that of "any" op, which works on decoded values.
KNOWN = {}

LOGICAL = {str(t).removeprefix("torch."): t for t in
           (torch.float32, torch.float64, torch.bfloat16, torch.float16)}  # fmt: skip


def _sharded_types() -> tuple[type, ...]:
    """DTensor, if it is imported: that takes half a second, and who has a DTensor has done it."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return () if distributed is None else (distributed.DTensor,)


def is_sharded(t) -> bool:
    """Whether `t` is a DTensor."""
    return isinstance(t, _sharded_types())


def any_sharded(tensors: Iterable[Tensor | None]) -> bool:
    """Whether some of many tensors is a DTensor."""
    types = _sharded_types()
    return any(isinstance(t, types) for t in tensors)


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return t._local_tensor if is_sharded(t) else t


def locals_of(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """`local` of each of many tensors; None stays None."""
    types = _sharded_types()
    return [t._local_tensor if isinstance(t, types) else t for t in tensors]


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


class ScaledTensor(Interchange):
    """A tensor stored as low-precision `qdata` and f32 decode `scale`s.

    A write to it takes effect, encoded again, or raises an error that names the op. Assignment to a
    plain tensor, `x.data = t`, cannot be intercepted: x is left without memory, and reading it ends
    the process. Use `x.data = t.dequantize()`.

    Args:
        qdata: codes of a layout's dtype, of any shape.
        scale: float32 decode multipliers, of the shape that `layout.scale_shape` gives.
        amax: float32 largest magnitude of the values that were encoded, shaped like scale, or None.
            Encoding saturates, so a non-finite amax is the only trace of an infinity.
        dtype: the logical dtype that other code sees.
        layout: default: one scale for the tensor, in the format of qdata's dtype. The attribute is
            `qlayout`, since `layout` is torch's (strided or sparse).
        qt: the codes of the matrix [rows, last axis], transposed and padded with zeros to
            multiples of 16: the layout in which a weight gradient reads them. An op that casts an
            activation, or the gradient of one, writes both; a linear layer then casts nothing.
        qt_scale: the scales of qt where they are not `scale`: those of blocks or tiles.

    Raises:
        TypeError: a dtype that is none of the above.
        ValueError: a scale that does not fit the layout.
    """

    qdata: Tensor
    scale: Tensor
    amax: Tensor | None
    qlayout: Layout
    qt: Tensor | None
    qt_scale: Tensor | None
    grad_format = "bf16"  # of the sum, once a second micro-batch adds to FP8 codes; or "f32"
    shares_scale = False  # a part of another ScaledTensor, which has the same scale
    owned_rows = None  # the rows of FSDP2's shard, in memory that it pads
    source: ScaledTensor | None = None  # the tensor whose codes this one shares
    is_transient = False  # FSDP2 frees and refills the codes of an all-gathered weight
    is_frozen = False  # a weight that does not train, and what is made of it
    sequence_input = None  # tensor_parallel/linear.py's Input, on a gathered activation

    @staticmethod
    def __new__(
        cls, qdata, scale, amax=None, dtype=torch.float32, layout=None, qt=None, qt_scale=None
    ):
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            qdata.size(),
            strides=qdata.stride(),
            storage_offset=qdata.storage_offset(),
            dtype=dtype,
            device=qdata.device,
        )
        torch._C._set_throw_on_mutable_data_ptr(out)  # there is no memory behind it
        return out

    def __init__(
        self, qdata, scale, amax=None, dtype=torch.float32, layout=None, qt=None, qt_scale=None
    ):
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
        self.qt, self.qt_scale = qt, qt_scale

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it is stored as: "qdata", "scale" and, where there is one, "amax".
        (`qt` follows from them.)"""
        parts = {"qdata": self.qdata, "scale": self.scale}
        return parts if self.amax is None else {**parts, "amax": self.amax}

    def store_(self, qdata: Tensor, scale: Tensor, amax: Tensor | None) -> ScaledTensor:
        """Replace the tensors that it is stored as: the same shape and grain in another format or
        other memory. The caller rewrites its FP8 copies."""
        self.qlayout = replace(self.qlayout, format=Layout.of(qdata.dtype).format)
        self.qdata, self.scale, self.amax, self.qt = qdata, scale, amax, None
        return self

    def description(self) -> dict:
        """The JSON values that `rebuild` needs beside the parts."""
        return {"dtype": str(self.dtype).removeprefix("torch."), **asdict(self.qlayout)}

    @classmethod
    def rebuild(cls, parts: dict[str, Tensor], description: dict) -> ScaledTensor:
        """The tensor that `parts()` and `description()` came from.

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
        if self.qlayout.grain == "tile" and self.dim() > 2:
            return torch.stack([part.dequantize(dtype) for part in _matrices(self)])
        direct = dtype in (torch.float32, torch.float16, torch.bfloat16)
        out = torch.ops.quaver.dequantize(
            self.qdata,
            self.scale,
            dtype if direct else torch.float32,
            self.qlayout.grain,
            self.qlayout.block,
        )
        return out if direct else out.to(dtype)

    def _like(
        self, qdata, scale=None, amax=None, dtype=None, qt=None, qt_scale=None
    ) -> ScaledTensor:
        """This tensor's kind around other data."""
        out = ScaledTensor(
            qdata,
            self.scale if scale is None else scale,
            self.amax if amax is None else amax,
            dtype or self.dtype,
            self.qlayout,
            qt,
            qt_scale,
        )
        if self.grad_format != "bf16":
            out.grad_format = self.grad_format
        if self.is_frozen:
            out.is_frozen = True
        return out

    def _map(self, function, dtype=None) -> ScaledTensor:
        """`function` on every tensor inside."""
        others = (None if t is None else function(t) for t in (self.amax, self.qt, self.qt_scale))
        amax, *transposed = others
        return self._like(function(self.qdata), function(self.scale), amax, dtype, *transposed)

    def view_of_codes(self, qdata: Tensor, qt: Tensor | None = None) -> ScaledTensor:
        """A tensor around a view of this one's codes, with the same scale."""
        out = self._like(qdata, qt=qt, qt_scale=None if qt is None else self.qt_scale)
        out.shares_scale = self.shares_scale or qdata.numel() != self.numel()
        out.is_transient = self.is_transient
        out.source = self
        return out

    def sources(self) -> list[ScaledTensor]:
        """This tensor, and those that it is a view of."""
        found = [self]
        while found[-1].source is not None and not any(t is found[-1].source for t in found):
            found.append(found[-1].source)
        return found

    def refresh_copies(self) -> ScaledTensor:
        """Brings a weight's FP8 copies up to date; call it after the contents changed."""
        for changed in self.sources():
            changed.qt = None
            copies = changed.__dict__.get("fp8_weight")
            if copies is not None:
                copies.rewrite(changed)
        return self

    @torch.no_grad()
    def assign_(self, value: Tensor) -> None:
        """`t.data = value`: other memory, as in torch, with the values' nearest codes; or the
        memory of a `value` that is stored alike. Earlier views keep the earlier memory.

        Raises TypeError for a value that is no floating-point tensor.
        """
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise TypeError(f".data =: wanted a floating-point tensor, got {value!r}")
        if not isinstance(value, ScaledTensor) or value.qlayout != self.qlayout:
            value = encode(value, self.qlayout, self.dtype)
        kind = self.shape, self.stride(), self.device
        if kind != (value.shape, value.stride(), value.device):
            torch._C.TensorBase.data.__set__(self, value.detach().to(self.dtype))
            self.__dict__.pop("fp8_weight", None)
        self.source, self.shares_scale = value, value.shares_scale
        self.store_(value.qdata, value.scale, value.amax).refresh_copies()
        if not self.is_inference():
            torch.autograd.graph.increment_version(self)

    def encoded(self, value: Tensor, seed: int | None = None) -> ScaledTensor:
        """`value` as this tensor would store it: under a just-in-time scale; for a part of another
        tensor, under the scale that both have.

        Raises:
            ValueError: a value that does not fit into the scale of a part.
        """
        tied = self.scale if self.shares_scale else None
        new = encode(value.expand(self.shape), self.qlayout, self.dtype, tied, seed)
        if tied is not None and self.numel():
            limit = tied.abs() * torch.finfo(self.qdata.dtype).max
            if not bool((new.amax <= limit).all()):
                raise ValueError(
                    f"ScaledTensor: {new.amax.max().item()} does not fit into a part with scale "
                    f"{tied.max().item()}, which the rest of the tensor has too; write to the "
                    "whole tensor (whole[index] = value)"
                )
        return new

    @torch.no_grad()
    def write_(self, new: ScaledTensor, overwrite: bool = True) -> ScaledTensor:
        """Writes the codes and scale that `encoded` made. Unless it is an `overwrite` of all
        contents, an amax that was not finite stays so, because the codes do not show it."""
        if self.amax is not None and new.amax is not None:
            before = self.amax
            if self.shares_scale:
                self.amax.copy_(torch.maximum(new.amax, before))
            elif overwrite:
                self.amax.copy_(new.amax)
            else:
                self.amax.copy_(torch.where(before.isfinite(), new.amax, torch.nan))
        self.qdata.copy_(new.qdata)
        if not self.shares_scale:
            self.scale.copy_(new.scale)
        return self.refresh_copies()

    def __setitem__(self, index, value) -> None:
        """Decodes, writes and encodes anew, to nearest. torch's own would write to a part of the
        tensor, which would have to keep the scale."""
        plain = self.detach().dequantize()
        plain[index] = value
        tied = self.shares_scale
        self.copy_(plain if tied else encode(plain, self.qlayout, self.dtype))

    def __tensor_flatten__(self):
        names = [*self.parts()] if self.qt is None else [*self.parts(), "qt"]
        if self.qt is not None and self.qt_scale is not None:
            names.append("qt_scale")
        return names, (self.dtype, self.qlayout)

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        amax, qt, qt_scale = (inner.get(name) for name in ("amax", "qt", "qt_scale"))
        return ScaledTensor(inner["qdata"], inner["scale"], amax, *context, qt, qt_scale)

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
        return KNOWN["any"](func, args, kwargs)

    # Without this, torch would wrap every result in the subclass again.
    __torch_function__ = torch._C._disabled_torch_function_impl


def encode(
    value: Tensor,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    scale: Tensor | None = None,
    seed: int | None = None,
    power_of_two: bool = True,
) -> ScaledTensor:
    """`value` in a layout, with `scale` or a just-in-time one, by default a power of two; rounds to
    nearest, or with a `seed` stochastically."""
    value = value.detach()
    if isinstance(value, ScaledTensor):
        value = value.dequantize(torch.float32)
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        value = value.to(torch.float32)
    if layout.grain == "flat":
        q, scale = torch.ops.quaver.encode_state(value, layout.dtype, layout.expand)
        return ScaledTensor(q, scale, None, dtype, layout)
    if layout.format in ("f32", "bf16"):
        amax = (
            value.abs().amax().float()
            if value.numel()
            else value.new_zeros((), dtype=torch.float32)
        )
        one = torch.ones_like(amax) if scale is None else scale
        q = value if scale is None else value / scale
        q = q.to(layout.dtype, copy=True)
        return ScaledTensor(q, one, amax, dtype, layout)
    if layout.grain == "tile" and value.dim() > 2:
        scales = [None] * len(value) if scale is None else scale.unbind()
        parts = [
            encode(part, layout, dtype, of, seed, power_of_two)
            for part, of in zip(value, scales, strict=True)
        ]
        return _stack(parts, dtype, layout)
    stochastic, seed = seed is not None, seed or 0
    q, scale, amax = torch.ops.quaver.quantize(
        value, layout.dtype, scale, None, layout.grain, layout.block, power_of_two, stochastic, seed
    )
    return ScaledTensor(q, scale, amax, dtype, layout)


def _matrices(stack: ScaledTensor) -> list[ScaledTensor]:
    """The parts along the first axis of a stack whose matrices have scales of their own."""
    parts = zip(stack.qdata, stack.scale, strict=True)
    return [ScaledTensor(q, scale, None, stack.dtype, stack.qlayout) for q, scale in parts]


def _stack(parts: list[ScaledTensor], dtype: torch.dtype, layout: Layout) -> ScaledTensor:
    """The inverse of `_matrices`."""
    names = ("qdata", "scale", "amax")
    q, scale, amax = (torch.stack([getattr(p, name) for p in parts]) for name in names)
    return ScaledTensor(q, scale, amax, dtype, layout)


torch.serialization.add_safe_globals([ScaledTensor, Layout])
