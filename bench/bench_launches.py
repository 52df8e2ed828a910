"""Launches (and clearings of memory) of a linear layer, a Llama block and a training step, counted
where kernels are started (launches.py), so that a fused op hides none.

    cmake --build build/release --target quaver_launches && python bench/bench_launches.py
    python bench/bench_launches.py --check     # fails where a count grew
    python bench/bench_launches.py --ops coat  # the launches of a recipe by op

The linear layer has Llama 7B's sizes and 8k tokens. Block and step are small: each op launches the
same kernels at every size whose axes are multiples of 16 and whose rows hold whole groups.
"""

import argparse
import json
import sys

import launches
import torch
from torch import nn

RECIPES = ("bf16", "tensorwise", "fp8lm-o2", "coat")
BARS = {
    ("linear", "fp8lm-o2"): 9,
    ("linear", "coat"): 8,
    ("block", "fp8lm-o2"): 100,
    ("block", "coat"): 70,
}
WHAT = {
    "linear": "a linear layer, forward and backward",
    "block": "a Llama block, forward and backward",
    "step": "a step of a Llama of 2 blocks, clipping and optimizer included",
}


def linear(quaver, recipe):
    """Forward and backward of a layer of Llama 7B over 8k tokens, which hold no values."""
    layer = nn.Linear(4096, 4096, bias=False, device="meta").to_empty(device="cpu")
    (layer,) = quaver.convert(nn.Sequential(layer), recipe=recipe)
    x = torch.empty(8192, 4096, dtype=torch.bfloat16).requires_grad_()
    dy = torch.empty(8192, 4096, dtype=torch.bfloat16)

    def run():
        x.grad = layer.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.backward(dy)

    return run


def llama(quaver, recipe):
    from quaver.models import Config
    from quaver.models.llama import Llama

    torch.manual_seed(0)
    config = Config(vocab=256, dim=256, layers=2, heads=2, kv_heads=2, ffn=512, context=128)
    return quaver.convert(Llama(config), recipe=recipe)


def block(quaver, recipe):
    """Forward and backward of a block of a Llama, whose residual stream is f32."""
    model = llama(quaver, recipe)
    x = torch.randn(1, 128, 256, requires_grad=True)
    dy = torch.randn(1, 128, 256)

    def run():
        model.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = model.blocks[0](x, (model.cos, model.sin))
        y.backward(dy)

    return run


def step(quaver, recipe):
    """A whole training step, which adds no gradient to an older one."""
    model = llama(quaver, recipe)
    optimizer = quaver.AdamW(model.parameters(), lr=1e-3, recipe=recipe)
    tokens = torch.randint(256, (1, 129))

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), tokens[:, 1:].flatten()
            )
        loss.backward()
        quaver.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def counted(recipes):
    """{what: {recipe: launches by op}}."""
    library, quaver = launches.load()
    result = {}
    for build in (linear, block, step):
        result[build.__name__] = found = {}
        for recipe in recipes:
            run = build(quaver, recipe)
            launches.count(library, run)  # makes the optimizer's states
            found[recipe] = launches.count(library, run)
    return result


def grown(totals):
    """Counts above those of bench/results/launches.json."""
    import common

    kept = json.loads((common.RESULTS / "launches.json").read_text())
    return [
        f"{what}, {recipe}: {n} launches, {kept[what].get(recipe, 'none')} kept"
        for what, found in totals.items()
        for recipe, n in found.items()
        if n > kept[what].get(recipe, -1)
    ]


def rows_of(totals):
    import common

    for what, found in totals.items():
        for recipe, n in found.items():
            name, bar = f"launches of {WHAT[what]}, {recipe}", BARS.get((what, recipe))
            if bar is not None:
                yield common.judge(name, n, "at most", bar)
            else:
                print(f"{name:<72} {n:9d}")
                yield {"name": name, "value": n}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the kept counts")
    parser.add_argument("--ops", metavar="RECIPE", help="show a recipe's launches by op")
    args = parser.parse_args()
    if not launches.LIBRARY.exists() and not args.check:
        return print(f"bench_launches: left out: {launches.LIBRARY} is not built")
    found = counted([args.ops] if args.ops else RECIPES)
    if args.ops:
        for what, recipes in found.items():
            print(f"{WHAT[what]}: {recipes[args.ops].total()}")
            for op, n in recipes[args.ops].most_common():
                print(f"{n:6d}  {op}")
        return
    totals = {w: {recipe: n.total() for recipe, n in f.items()} for w, f in found.items()}
    if args.check:
        if said := grown(totals):
            sys.exit("bench_launches: counts grew:\n" + "\n".join(said))
        return print("no count is above bench/results/launches.json")
    import common

    common.finish("launches", list(rows_of(totals)), **totals)


if __name__ == "__main__":
    main()
