"""Plain weights of which FSDP2 gathers FP8 codes: those of 128 x 128 tiles, which products take.

The codes and scales are those of one process: a tile that two ranks hold has the scale of the whole
tile. Per weight and gather one small message makes the scales known, then FSDP2's own carries one
byte a value. (DeepSeek-V3, arXiv 2412.19437, section 3.3.2, has the tiles.)
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from ...comm.transport import Transport
from ...layout import FLAT_BLOCK, Layout
from ...nn.cast import nan_unless_finite
from ...nn.linear import LinearBase
from ...placement import transport
from ...recipe import LinearRecipe
from ...tensor import ScaledTensor

_ops = torch.ops.quaver


class TileShard:
    """What a shard [R, K] of a plain weight is besides a tensor, as FSDP2 finds it in its DTensor:
    a base of the shard's class beside the tensor's own. What torch makes of such a shard is
    plain."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def to(self, *args, **kwargs) -> TileShard:
        """As torch's: FSDP2 gathers from the result where it keeps shards in the CPU's memory."""
        return _gathering(super().to(*args, **kwargs))

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        rows = -(-outer_size[0] // mesh.size())
        link = transport(mesh.get_group())
        codes, scale = tile_codes(self, outer_size[0], module.rule, link)
        padding = (0, 0, 0, rows - codes.shape[0])  # the last ranks hold fewer rows, or none
        return (F.pad(codes.view(torch.uint8), padding),), (outer_size, scale, codes.dtype)

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        (codes,), (size, scale, dtype) = outputs, metadata
        if out is not None:
            out.scale.copy_(scale)
            return None
        codes = codes[: size[0]].view(dtype)
        weight = ScaledTensor(codes, scale, None, param_dtype, Layout.of(dtype, "tile"))
        weight.is_transient = True
        return weight, ()

    def __deepcopy__(self, memo):
        return self.detach().clone()

    def __reduce_ex__(self, protocol):
        return self.detach().__reduce_ex__(protocol)


@functools.cache
def _class(plain: type) -> type:
    return type(f"Tile{plain.__name__}", (TileShard, plain), {})


def _gathering(shard: Tensor) -> Tensor:
    """The same tensor, a plain one or a plan's fake one, as a TileShard too."""
    if type(shard) in (Tensor, FakeTensor):
        shard.__class__ = _class(type(shard))
    return shard


def tile_codes(shard: Tensor, rows: int, rule: LinearRecipe, link: Transport) -> tuple:
    """The codes [R, K] of this rank's shard of a weight of `rows` rows, which ranks hold as
    torch.chunk cuts them, and the scales of all of the weight's tiles. All ranks call it."""
    chunk = -(-rows // link.size)
    first = min(link.rank * chunk, rows)
    above = first % FLAT_BLOCK  # rows of the first tile that other ranks hold
    x = F.pad(shard, (0, 0, above, 0)) if above else shard
    chosen = None, "tile", FLAT_BLOCK, rule.power_of_two, False, 0
    codes, _, amax = _ops.quantize(x, rule.weight, None, *chosen)
    amaxes = amax.new_zeros(Layout.of(rule.weight, "tile").scale_shape((rows, shard.shape[1])))
    mine = slice(first // FLAT_BLOCK, first // FLAT_BLOCK + len(amax))
    amaxes[mine] = amax.nan_to_num(nan=torch.inf, posinf=torch.inf)
    amaxes = link.max(amaxes, "scale").wait()
    # The largest value of a row alone gives the scale that a tile with this amax has.
    row = None, "row", FLAT_BLOCK, rule.power_of_two, False, 0
    scales = _ops.quantize(amaxes.reshape(-1, 1), rule.weight, None, *row)[1].view_as(amaxes)
    if chunk % FLAT_BLOCK and link.size > 1:  # else a shard's tiles are the weight's
        codes, _, _ = _ops.quantize(x, rule.weight, scales[mine].contiguous(), *chosen)
    return codes[above:], nan_unless_finite(scales, amaxes)


def gather_tiles(model: nn.Module) -> None:
    """Makes the shards of plain weights with scales of tiles TileShards, where they are not.
    Whatever replaces a parameter's memory (`to`, a state dict that is assigned) leaves them plain,
    so this is called before each forward."""
    for module in model.modules():
        if not isinstance(module, LinearBase) or module.rule.grain != "block":
            continue
        if isinstance(module.weight, DTensor):
            _gathering(module.weight._local_tensor)
