"""Bytes of global memory that a Llama block of 7B's sizes moves, besides products and attention:
forward and backward of 8192 tokens under bf16 autocast, the residual stream in f32 as models.Llama
has it, and in bf16. Counted on fake tensors (traffic.py), not measured.

    python bench/bench_bytes.py
    python bench/bench_bytes.py --check     # fails where a count grew
    python bench/bench_bytes.py --ops coat  # the GB of a recipe by op
"""

import argparse
import json
import sys
from unittest.mock import patch

import common
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from traffic import Traffic, rms_norm

import quaver
from quaver.models import Config
from quaver.models.llama import Block
from quaver.planning.step import materialise

RECIPES = ("bf16", "tensorwise", "fp8lm-o2", "coat")
STREAMS = {"f32": torch.float32, "bf16": torch.bfloat16}
BARS = {"coat": 13.0}  # GB
TOKENS = 8192
LLAMA_7B = Config(vocab=256, dim=4096, layers=32, heads=32, kv_heads=32, ffn=11008, context=TOKENS)


def block(recipe: str, stream: str) -> Traffic:
    """The traffic of the block's forward and backward, with no gradient from before."""
    with torch.device("meta"):
        model = nn.Sequential(Block(LLAMA_7B))
    (layer,) = quaver.convert(model, recipe=recipe)
    traffic = Traffic()
    with FakeTensorMode(), patch("torch.nn.functional.rms_norm", rms_norm(traffic)):
        materialise(layer)
        x, dy = (torch.empty(1, TOKENS, LLAMA_7B.dim, dtype=STREAMS[stream]) for _ in range(2))
        position = tuple(torch.empty(TOKENS, LLAMA_7B.head_dim) for _ in range(2))
        with traffic:
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x.requires_grad_(), position)
            y.backward(dy)
    return traffic


def counted(recipes) -> dict:
    """{stream: {recipe: Traffic}}."""
    return {stream: {recipe: block(recipe, stream) for recipe in recipes} for stream in STREAMS}


def totals_of(found: dict) -> dict:
    """{stream: {recipe: bytes}}, as counted."""
    return {
        stream: {name: round(sum(move.counted for move in t.moves)) for name, t in recipes.items()}
        for stream, recipes in found.items()
    }


def grown(totals: dict) -> list[str]:
    """Counts above those of bench/results/bytes.json."""
    kept = json.loads((common.RESULTS / "bytes.json").read_text())["bytes"]
    return [
        f"{recipe}, {stream} residual stream: {n} bytes, {kept[stream].get(recipe, 'none')} kept"
        for stream, found in totals.items()
        for recipe, n in found.items()
        if n > kept[stream].get(recipe, -1)
    ]


def rows_of(found: dict):
    for stream, recipes in found.items():
        for recipe, traffic in recipes.items():
            name = f"GB of a Llama 7B block besides products, {recipe}, {stream} residual stream"
            n = sum(move.counted for move in traffic.moves) / 1e9
            least = sum(move.least for move in traffic.moves) / 1e9
            if recipe in BARS:
                yield common.judge(name, n, "at most", BARS[recipe], least=least)
            else:
                print(f"{name:<72} {n:9.4g}")
                yield {"name": name, "value": n, "least": least}


def show(found: dict, recipe: str) -> None:
    for stream, recipes in found.items():
        moves = recipes[recipe].by_op()
        total = sum(move.counted for move in moves.values())
        print(f"{recipe}, {stream} residual stream: {total / 1e9:.3f} GB")
        print("  counted   least")
        for move in moves.values():
            if move.counted >= 1e6:
                print(f"{move.counted / 1e9:9.3f} {move.least / 1e9:7.3f}  {move.what}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the kept counts")
    parser.add_argument("--ops", metavar="RECIPE", help="show a recipe's GB by op")
    args = parser.parse_args()
    found = counted([args.ops] if args.ops else RECIPES)
    if args.ops:
        return show(found, args.ops)
    totals = totals_of(found)
    if args.check:
        if said := grown(totals):
            sys.exit("bench_bytes: counts grew:\n" + "\n".join(said))
        return print("no count is above bench/results/bytes.json")
    common.finish("bytes", list(rows_of(found)), bytes=totals)


if __name__ == "__main__":
    main()
