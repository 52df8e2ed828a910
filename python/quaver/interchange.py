"""Interfaces of a ScaledTensor beside ops: addresses, NumPy, DLPack, files, copies, FSDP2.

A ScaledTensor has no memory of its logical dtype. Where a decoded copy will do it gives one;
where an address is wanted it refuses by name.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import FORMATS

# Attributes that copies and pickles leave out: `rebuild` makes them, or they belong to one object.
OWN = ("qdata", "scale", "amax", "qlayout", "qt", "source", "shares_scale", "fp8_weight")


def rebuild(cls, parts: dict, description: dict, requires_grad: bool, attributes: dict) -> Tensor:
    """A pickled ScaledTensor. FP8 codes come as bytes: pickle has no storage of FP8."""
    codes = parts["qdata"].view(FORMATS[description["format"]])
    out = cls.rebuild({**parts, "qdata": codes}, description)
    out.__dict__.update(attributes)
    return out.requires_grad_(requires_grad)


def _refused(name: str, remedy: str):
    def refuse(self, *args, **kwargs):
        raise RuntimeError(
            f"{name}: a ScaledTensor is stored as codes and a scale and has no memory of its "
            f"logical dtype; {remedy}"
        )

    return refuse


class NoMemory(torch.UntypedStorage):
    """The storage of a ScaledTensor: a size and an identity, by which others size files and find
    tied weights. Raises RuntimeError where its memory is wanted."""


for _name in (
    "data_ptr", "mutable_data_ptr", "copy_", "fill_", "clone", "tolist", "cpu", "cuda", "to",
    "share_memory_", "pin_memory", "byteswap", "__getitem__", "__setitem__", "_write_file",
    "resize_",
):  # fmt: skip
    _remedy = "use those of t.qdata, t.dequantize() or the state_dict()"
    setattr(NoMemory, _name, _refused(f"untyped_storage().{_name}", _remedy))


class Interchange(torch.Tensor):
    """The methods of ScaledTensor that other libraries call."""

    data_ptr = _refused(
        "data_ptr",
        "use t.qdata.data_ptr(), or t.dequantize(); under Accelerate's FSDP2 use a recipe of plain "
        "weights (tensorwise), or quaver.distributed.fully_shard",
    )
    storage = _typed_storage = _refused("storage", "use t.dequantize() or the state_dict()")
    apply_ = _refused("apply_", "use t.copy_(t.dequantize().apply_(f))")
    map_ = _refused("map_", "use t.copy_(t.dequantize().map_(other, f))")
    map2_ = _refused("map2_", "use t.copy_(t.dequantize().map2_(a, b, f))")
    __dlpack_c_exchange_api__ = None  # would hand out torch's own view of the memory

    def untyped_storage(self) -> NoMemory:
        storage = super().untyped_storage()
        storage.__class__ = NoMemory
        return storage

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.assign_(value)

    def numpy(self, *, force: bool = False):
        """The decoded values as a read-only NumPy array: the tensor would not see a write."""
        if self.requires_grad and not force:
            raise RuntimeError("numpy: the tensor requires grad; use detach().numpy()")
        array = self.detach().dequantize().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self):
        return self.detach().dequantize().tolist()

    def __dlpack__(self, *, copy=None, **kwargs):
        """A copy of the decoded values where one is asked for. Raises BufferError otherwise: torch
        hands out memory that can be written even where the exporter marks it read-only."""
        if copy is not True:
            raise BufferError(
                "__dlpack__: a ScaledTensor has no memory that others can write; pass its decoded "
                "values, t.dequantize(), or ask for a copy: from_dlpack(t, copy=True)"
            )
        return self.detach().dequantize().__dlpack__(**kwargs)

    def share_memory_(self) -> Tensor:
        """Move codes and scales to shared memory."""
        for part in self.parts().values():
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(part.is_shared() for part in self.parts().values())

    # FSDP2's all-gather calls these on the shard.

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """The codes to gather: those that `module` multiplies by, or for other modules those
        stored, so that it gets decoded values."""
        encode = getattr(module, "all_gather_codes", None)
        codes, scale = (self.qdata, self.scale) if encode is None else encode(self)
        missing = -(-outer_size[0] // mesh.size()) - codes.shape[0]
        if missing:  # the last ranks hold fewer rows, or none
            padding = (0, 0) * (codes.dim() - 1) + (0, missing)
            codes = F.pad(codes.view(torch.uint8), padding).view(codes.dtype)
        # FP8 is sent as bytes, because gloo does not gather FP8.
        sent = codes.view(torch.uint8) if codes.element_size() == 1 else codes
        return (sent,), (scale, codes.dtype)

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        """The weight of the gathered codes; later gathers fill the same memory."""
        (codes,), (scale, dtype) = outputs, metadata
        if out is not None:
            out.scale.copy_(scale)
            return None
        weight = type(self)(codes.view(dtype), scale.clone(), None, param_dtype)
        weight.is_transient = dtype != torch.float16
        return weight, ()

    def _attributes(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in OWN}

    def __reduce_ex__(self, protocol):
        parts = self.parts()
        if self.qdata.element_size() == 1:
            parts["qdata"] = self.qdata.view(torch.uint8)
        args = (type(self), parts, self.description(), self.requires_grad, self._attributes())
        return rebuild, args

    def __copy__(self):
        out = self.detach()
        out.__dict__.update(self._attributes())
        return out.requires_grad_(self.requires_grad)

    def __deepcopy__(self, memo):
        if not self.is_leaf:
            raise RuntimeError("deepcopy: only leaf tensors can be copied deeply; use detach()")
        if id(self) not in memo:
            out = memo[id(self)] = self.detach().clone()
            out.__dict__.update(copy.deepcopy(self._attributes(), memo))
            out.requires_grad_(self.requires_grad)
            if self.grad is not None:
                out.grad = copy.deepcopy(self.grad, memo)
        return memo[id(self)]


torch.serialization.add_safe_globals([rebuild])
