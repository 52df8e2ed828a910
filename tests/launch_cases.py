"""Calls of ops whose CUDA host code composes several kernels; as a script, over the library that
runs the kernels on the host (bench/launches.py)."""

import itertools
import sys
from pathlib import Path

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
F32, BF16 = torch.float32, torch.bfloat16


def warm(amax):
    """A history that forecasts."""
    return torch.tensor([16.0] + [amax] * 16)


def grouped_products(randn):
    """{name: products of groups}: ragged, of one row, empty, and rows of none."""
    ops, ends, found = torch.ops.quaver, torch.tensor([37, 38, 38, 140]), {}
    a, b, bt = (randn(*s).to(E4M3) for s in ((150, 144), (4, 48, 144), (48, (150 // 16 + 4) * 16)))
    for e, (begin, end) in enumerate(itertools.pairwise((0, *ends.tolist()))):
        first = (begin // 16 + e) * 16  # a group's columns; zeros after them
        bt.view(torch.uint8)[:, first + end - begin : first + -(-(end - begin) // 16) * 16] = 0
    scales = {
        "tensor": ((4,), (4,), (4,)),
        "row": ((150, 1), (4, 48, 1), (4, 48, 1)),
        "block": ((150, 2), (4, 1, 2), (48, 150 // 128 + 4)),
    }
    for grain, shapes in scales.items():
        of_a, of_b, of_t = (randn(*shape, dtype=F32).abs() + 0.5 for shape in shapes)
        found[f"products of groups, {grain}"] = (
            ops.grouped_gemm(a, of_a, b, of_b, ends, 45, F32),
            ops.grouped_gemm_weight(bt, of_t, bt, of_t, ends, 45, 40, F32),
        )
    return found


def grouped_casts(randn):
    """{name: casts of groups and stacks}, and of layers' products over them."""
    from quaver import recipe
    from quaver.nn.grouped import GroupedProduct

    ops, ends, found = torch.ops.quaver, torch.tensor([37, 38, 38, 140]), {}
    x, stack = randn(150, 144), randn(4, 40, 144)
    for grain in ("tensor", "row", "block", "tile"):
        given = randn(4, dtype=F32).abs() if grain == "tensor" else None
        found[f"casts of stacks, {grain}"] = (
            *ops.cast_stack(stack, E4M3, grain),
            *ops.cast_stack(stack, E5M2, grain, given, True, False, True),
            *ops.cast_stack(stack[:, :0], E4M3, grain),
        )
        if grain == "tile":
            continue
        found[f"casts of groups, {grain}"] = (
            *ops.cast_groups(x, ends, E4M3, grain),
            *ops.cast_groups(x, ends, E5M2, grain, False, True),
            *ops.cast_groups(x, ends[:0], E5M2, grain),
            *ops.cast_groups(x[:0], ends * 0, E5M2, grain),
        )
    found["casts of groups, tiles"] = ops.cast_groups(x, ends, E4M3, "block", True, True, True)
    for name in ("tensorwise", "rowwise", "blockwise", "coat-blockwise"):
        for input_major in (False, True):
            leaves = x.detach().requires_grad_(), stack.detach().requires_grad_()
            weight = leaves[1].transpose(1, 2) if input_major else leaves[1]
            y = GroupedProduct.apply(
                leaves[0], weight, ends, recipe.get(name).linear, F32, input_major, True
            )
            gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
            found[f"products of experts, {name}, {input_major=}"] = y.detach(), *gradients
    return found


def results():
    """{name: a call's results and the histories that it wrote}."""
    ops = torch.ops.quaver
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=BF16):
        return torch.randn(shape, generator=generator).to(dtype)

    x, dy, up = randn(48, 32), randn(48, 64), randn(48, 32)
    found = {}
    for name, amax in (("current", None), ("delayed", 6.0), ("stale", 0.01)):
        for kind, weight in (("bf16", randn(64, 32)), ("f32", randn(64, 32, dtype=F32))):
            states = [None if amax is None else warm(amax) for _ in range(2)]
            y, q, qt, scale, w_scale = ops.linear(
                x, None, None, weight, None, None, 64, E4M3, E4M3, BF16, True, False, states[0]
            )
            rest = ops.linear_backward(
                dy, None, None, None, weight, w_scale, qt, scale, None, 64, 32, E5M2, E4M3, BF16,
                BF16, E4M3, False, states[1],
            )  # fmt: skip
            found[f"linear {name} {kind}"] = q, qt, scale, w_scale, *states
            found[f"products {name} {kind}"] = y, *rest
        state = None if amax is None else warm(amax)
        found[f"quantize {name}"] = *ops.quantize(x, E4M3, None, state), state
        state = None if amax is None else warm(amax)
        found[f"cast_transpose {name}"] = *ops.cast_transpose(x, E5M2, None, state), state
        state = None if amax is None else warm(amax)
        found[f"normalize {name}"] = *ops.normalize(
            x, up[0].float(), None, 1e-6, False, E4M3, history=state, block=16
        ), state  # fmt: skip
        states = [None if amax is None else warm(amax) for _ in range(3)]
        made = ops.activate(x, up, "silu", None, E4M3, history=states[0], block=16)
        found[f"activate {name}"] = *made, states[0]
        found[f"activate_backward {name}"] = *ops.activate_backward(
            dy[:, :32].contiguous(), *made[4:8], "silu", None, 16, E5M2, *states[1:]
        ), *states[1:]  # fmt: skip
        state = None if amax is None else warm(amax)
        made = ops.activate(x[:, :16], x[:, 16:], "silu", None, E4M3, block=16)
        saved, dy_half = made[4:8], dy[:, :16].contiguous()
        found[f"joint gradients {name}"] = *made, *ops.activate_backward(
            dy_half, *saved, "silu", None, 16, E5M2, state, joint=True
        ), state  # fmt: skip
    for tiles_t in (False, True):
        made = ops.activate_layouts(x, up, "silu", up[0].float(), E4M3, tiles_t, True, 16)
        found[f"blocks of activations, tiles {tiles_t}"] = made
        found[f"blocks of gradients, tiles {tiles_t}"] = ops.activate_backward_layouts(
            dy[:, :32].contiguous(), *made[4:8], "silu", None, 16, E4M3, tiles_t
        )
        found[f"blocks of norms, tiles {tiles_t}"] = ops.normalize_layouts(
            x, up[0].float(), up[1], 1e-6, True, E4M3, tiles_t, True, 16
        )
        found[f"blocks of layouts, tiles {tiles_t}"] = ops.cast_layouts(
            x, E4M3, "block", tiles_t=tiles_t
        )
    x[3, 5] = float("inf")
    made = ops.activate(x, up, "silu", None, E4M3, block=16, spread_nan=True)
    found["spread"] = (
        *ops.normalize(x, None, None, 1e-6, True, E4M3, block=16, spread_nan=True),
        *made,
        *ops.activate_backward(x, *made[4:8], "silu", None, 16, E5M2, spread_nan=True),
    )
    x[3, 5] = 1.0
    tall = randn(144, 160)
    for grain in ("row", "block", "tile"):
        q, scale, qt, qt_scale = ops.cast_layouts(tall, E4M3, grain)
        found[f"cast_layouts {grain}"] = q, scale, qt, qt_scale
        found[f"tiles {grain}"] = (
            *ops.quantize(tall, E4M3, granularity="tile"),
            ops.dequantize(q, scale, F32, grain, 128),
        )
        found[f"products of {grain}s"] = tuple(
            ops.gemm(q, scale, q, scale, bias, dtype)
            for bias, dtype in ((None, BF16), (None, F32), (randn(144), BF16))
        )
    a, b = (ops.cast_layouts(tall, E4M3, grain)[:2] for grain in ("block", "tile"))
    found["products of blocks by tiles"] = tuple(
        ops.gemm(*a, *b, bias, dtype)
        for bias, dtype in ((None, BF16), (None, F32), (randn(144), BF16))
    )
    out = randn(144, 144, dtype=F32)
    ops.gemm_(out, *a, *a, None, True)
    found["products of blocks, added"] = (out,)
    found["given"] = (
        *ops.quantize(x, E4M3, torch.tensor(0.5)),
        *ops.cast_transpose(x, E4M3, torch.tensor(0.5)),
    )
    heads = [x.view(1, 48, 2, 16), up.view(1, 48, 2, 16).transpose(1, 2).reshape(1, 48, 2, 16)]
    angles = [randn(48, 16, dtype=F32) for _ in range(2)]
    found["rotate"] = ops.rotate(heads, *angles, 3), ops.rotate(heads, *angles, 2, True)
    return found | grouped_products(randn) | grouped_casts(randn)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
    import launches

    library, _ = launches.load()
    library.quaver_launches_begin(True)
    torch.save(results(), sys.argv[1])
