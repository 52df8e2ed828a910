"""The error that one outlier channel leaves in a product's other channels, by the grain of scales.

Inputs of 1e-2 with one channel of 1e4, K = 4096. What the other channels give to the output is
compared with f64, so the outlier's own rounding is left out.
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


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(common.describe(common.machine()))
    found = errors()
    for grain, error in found.items():
        print(f"{grain:>6}: {error:.4f} of the output without the outlier's channel")
    what = "an outlier channel: error of the other channels' output, blocks over tensor"
    row = common.judge(what, found["block"] / found["tensor"], "at most", BAR, errors=found)
    common.finish("grains", [row])


if __name__ == "__main__":
    main()
