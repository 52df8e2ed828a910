"""The error that one outlier channel leaves in a product's other channels, by the grain of scales;
and what the scales of the transposed input that backward keeps cost in precision and in bytes.

Inputs of 1e-2 with one channel of 1e4, K = 4096. What the other channels give to the output is
compared with f64, so the outlier's own rounding is left out. The kept input is a SwiGLU's product
of normal values, whose channels differ in size by a log-normal factor of sigma 1.
"""

import argparse

import common
import torch

import quaver as qv
from quaver.recipe import get

K, TOKENS, OUTPUTS = 4096, 256, 256
OUTLIER = 1000  # its channel
BAR = 0.25  # of the tensor's error, for blocks
RECIPES = {"tensor": "tensorwise", "row": "rowwise", "block": "blockwise"}


def errors() -> dict[str, float]:
    """{grain: the relative error of the output without the outlier's share}."""
    generator = torch.Generator().manual_seed(0)
    x = 1e-2 * torch.randn(TOKENS, K, generator=generator)
    w = torch.randn(OUTPUTS, K, generator=generator) / K**0.5
    x[:, OUTLIER] = 1e4
    rest = torch.arange(K) != OUTLIER
    wanted = x[:, rest].double() @ w[:, rest].double().t()
    found = {}
    for grain, name in RECIPES.items():
        rule = get(name).linear
        kinds = (x, rule.input, rule.grain), (w, rule.weight, rule.weight_grain)
        codes = [
            qv.quantize(t, dtype, granularity=g, power_of_two=rule.power_of_two).dequantize()
            for t, dtype, g in kinds
        ]
        product = codes[0][:, rest].double() @ codes[1][:, rest].double().t()
        found[grain] = ((product - wanted).norm() / wanted.norm()).item()
    return found


def kept() -> dict[str, tuple[float, float, float]]:
    """{grain of the kept transpose: decibels of its values over their roundings, the share of
    values that become zero, bytes a value}, under scales that are powers of two."""
    generator = torch.Generator().manual_seed(1)
    gate, up, size = (
        torch.randn(n, generator=generator) for n in ((1024, 1024), (1024, 1024), 1024)
    )
    xt = (torch.nn.functional.silu(gate) * up * size.exp()).t().contiguous()
    found = {}
    for grain in ("tensor", "tile", "block"):
        q = qv.quantize(xt, granularity=grain)
        error = (q.dequantize() - xt).double()
        snr = 20 * (xt.double().norm() / error.norm()).log10().item()
        zeros = ((q.dequantize() == 0) & (xt != 0)).double().mean().item()
        found[grain] = snr, zeros, 1 + 4 * q.scale.numel() / xt.numel()
    # From the codes that forward multiplied, instead of from the values.
    rows = qv.quantize(xt.t().contiguous(), granularity="block").dequantize()
    again = qv.quantize(rows.t().contiguous(), granularity="block").dequantize()
    snr = 20 * (xt.double().norm() / (again - xt).double().norm()).log10().item()
    found["block, of codes"] = snr, ((again == 0) & (xt != 0)).double().mean().item(), 1 + 4 / 128
    return found


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(common.describe(common.machine()))
    found = errors()
    for grain, error in found.items():
        print(f"{grain:>6}: {error:.4f} of the output without the outlier's channel")
    what = "an outlier channel: error of the other channels' output, blocks over tensor"
    row = common.judge(what, found["block"] / found["tensor"], "at most", BAR, errors=found)
    saved = kept()
    for grain, (snr, zeros, size) in saved.items():
        print(f"kept by {grain}: {snr:.2f} dB, {zeros:.3%} become zero, {size:.4f} bytes a value")
    what = "decibels that tiles lose of a kept input against 1 x 128 blocks"
    lost = saved["block"][0] - saved["tile"][0]
    tiles = common.judge(what, lost, "at most", 0.01, kept=saved)
    common.finish("grains", [row, tiles])


if __name__ == "__main__":
    main()
