"""The formats of an exported weight: what each layer's matrix is stored as, and the config's words.

x ~= scale * q here too: transformers' `weight_scale_inv` and compressed-tensors' `weight_scale` are
both the multiplier that decodes, float32. Scales are powers of two, so that decoding is exact,
except where they are those of training by blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layout import Layout
from ..nn.cast import nan_unless_finite
from ..nn.linear import LinearBase
from ..nn.weight import cast_weight
from ..ops import quantize
from ..recipe import E4M3
from ..tensor import ScaledTensor

BLOCK = 128
STRIPE = 1 << 18  # values that are decoded at a time


@dataclass(frozen=True)
class Format:
    """How a linear layer's weight [N, K] is stored: e4m3 codes and a scale of `scale_shape(N, K)`
    named with `suffix`, which `encode(weight, layer)` makes; `config(left)` describes it, with the
    names of the layers that it leaves as they are. All None for plain bf16."""

    suffix: str | None = None
    scale_shape: Callable[[int, int], tuple[int, ...]] | None = None
    config: Callable[[list[str]], dict] | None = None
    blocks: bool = False

    def split_codes(
        self, weight: Tensor, layer: nn.Module, rows: list[int], name: str
    ) -> list[tuple[Tensor, Tensor]]:
        """The codes and scales of the `rows`-high parts that a weight is stored as. Blocks are
        those of the parts; one scale is the whole weight's.

        Raises UsageError for a weight that is not finite."""
        check_amax(weight, name)
        if self.blocks:
            parts = training_blocks(weight, layer, rows)
        else:
            q, scale = training_codes(weight, layer)
            parts = [(part, scale) for part in q.split(rows)]
        if not all(bool(scale.isfinite().all()) for _, scale in parts):
            raise not_finite(name)
        return [
            (q.contiguous(), scale.reshape(self.scale_shape(*q.shape)).contiguous())
            for q, scale in parts
        ]


def not_finite(name: str) -> UsageError:
    return UsageError(f"export: {name} has values that are not finite; export an earlier state")


def check_amax(weight: Tensor, name: str) -> None:
    """Raises UsageError for a master that is not finite: its codes saturate, its amax shows it."""
    amax = weight.detach().amax if isinstance(weight, ScaledTensor) else None
    if amax is not None and not bool(amax.isfinite().all()):
        raise not_finite(name)


def decoded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight's values as a plain tensor of `dtype`."""
    weight = weight.detach()
    return weight.dequantize(dtype) if isinstance(weight, ScaledTensor) else weight.to(dtype)


def training_codes(weight: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The e4m3 codes [N, K] of a weight and their scale (): those that the layer multiplies by, if
    it multiplies in e4m3 with one scale a weight. The scale is NaN if a plain weight is not
    finite."""
    weight = weight.detach()
    own = isinstance(layer, LinearBase) and layer.rule.weight == E4M3
    if own and layer.rule.grain == "tensor":
        cast = cast_weight(weight, E4M3, both=False)
        n, k = weight.shape
        return cast.q[:n, :k], cast.scale
    if isinstance(weight, ScaledTensor):
        weight = weight.dequantize(torch.float32)
    q = quantize(weight, E4M3)
    return q.qdata, nan_unless_finite(q.scale, q.amax)


def encode_blocks(x: Tensor, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """The e4m3 codes of a matrix [N, K] and the scales [N / 128, K / 128], rounded up, of its
    128 x 128 blocks; those at the edges are smaller. A scale is NaN where its block is not finite.
    Some rows are decoded at a time.
    """
    n, k = x.shape
    height = max(1, STRIPE // (k * BLOCK)) * BLOCK
    codes = torch.empty(n, k, dtype=torch.uint8, device=x.device)
    scales = []
    for start in range(0, n, height):
        rows = slice(start, start + height)
        values = decoded(x[rows], torch.float32)
        q = quantize(values, E4M3, granularity="tile", power_of_two=power_of_two)
        codes[rows] = q.qdata.view(torch.uint8)
        scales.append(nan_unless_finite(q.scale, q.amax))
    return codes.view(E4M3), torch.cat(scales)


def training_blocks(weight: Tensor, layer: nn.Module, rows: list[int]) -> list[tuple]:
    """The codes and scales of `encode_blocks` for each of the parts of a weight. Of a layer that
    multiplies by 128 x 128 blocks they are the layer's own, where parts begin with a block."""
    weight = weight.detach()
    own = isinstance(layer, LinearBase) and layer.rule.grain == "block"
    frozen = isinstance(weight, ScaledTensor) and weight.qlayout == Layout("e4m3", "tile")
    if frozen and all(n % BLOCK == 0 for n in rows[:-1]):
        heights = [-(-n // BLOCK) for n in rows]
        return list(zip(weight.qdata.split(rows), weight.scale.split(heights), strict=True))
    power_of_two = layer.rule.power_of_two if own else True
    return [encode_blocks(part, power_of_two) for part in weight.split(rows)]


def fp8_config(block: list[int] | None, left: list[str]) -> dict:
    """transformers' FineGrainedFP8Config; activations are quantised when the model runs."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": block,
        "modules_to_not_convert": left,
    }


def compressed_config(left: list[str]) -> dict:
    """compressed-tensors' QuantizationConfig: a scale a weight, a dynamic one a token."""
    kind = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**kind, "strategy": "tensor", "dynamic": False},
        "input_activations": {**kind, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": left,
    }


FORMATS = {
    "bf16": Format(),
    "fp8-block": Format(
        "weight_scale_inv",
        lambda n, k: (-(-n // BLOCK), -(-k // BLOCK)),
        lambda left: fp8_config([BLOCK, BLOCK], left),
        blocks=True,
    ),
    "fp8-tensor": Format("weight_scale_inv", lambda n, k: (), lambda left: fp8_config(None, left)),
    "compressed-tensors": Format("weight_scale", lambda n, k: (1,), compressed_config),
}
