"""AdamW over every state codec and kind of weight: bits, and moments that get stuck."""

import math

import pytest
import torch
from helpers import FP8, assert_same, everywhere, parts_of, randn, random_bits
from state_codecs import state_of, with_states
from torch import nn

import quaver as qv
from quaver import ScaledTensor, reference
from quaver.optim import STATES

E4M3 = FP8[0]
HYPER = (1e-2, 0.9, 0.95, 1e-8, 0.1)
INF = float("inf")


def grain(codec):
    """The name of a codec's grain in the reference."""
    return "expand" if codec.layout.expand else codec.layout.grain


PAIRS = [(name, name) for name in STATES] + [
    ("e4m3", "e5m2"), ("e5m2-expand", "e4m3-expand"), ("e4m3-tensor", "e4m3-expand"),
    ("e4m3-expand", "f32"), ("f32", "e4m3-expand"), ("e4m3-expand", "f16-tensor"),
]  # fmt: skip


@pytest.mark.parametrize("names", PAIRS, ids="/".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_pair_of_codecs_is_its_oracle_bit_for_bit(names, dtype):
    codecs = [STATES[name] for name in names]
    kinds = ["tensor", *(grain(c) for c in codecs)]
    for shape in ((5, 100), (1,), (0, 4), (128,), (3, 130)):
        start = randn(*shape).to(dtype)

        def run(start=start, shape=shape):
            p = nn.Parameter(start.clone())
            chosen = with_states(*names, bf16_master="nearest")
            optimizer = qv.AdamW([p], *HYPER[:1], HYPER[1:3], *HYPER[3:], recipe=chosen)
            out = []
            for t in range(1, 5):
                p.grad = randn(*shape, seed=t).to(dtype) * 10.0 ** -(t % 3)
                optimizer.step()
                out += state_of(optimizer, p)
            return out

        got = iter(everywhere(run))
        stored = [(start, torch.ones(()), torch.zeros(()))]
        stored += [parts_of(codec.zeros(start)) for codec in codecs]
        for t in range(1, 5):
            g = randn(*shape, seed=t).to(dtype) * 10.0 ** -(t % 3)
            top = g.float().abs().amax() if g.numel() else torch.zeros(())
            # A plain f16 weight has no scale of its own.
            weight = reference.adamw_fp8(
                [(stored[0][0].float(), *stored[0][1:]), *stored[1:]], g, top, t, *HYPER, kinds
            )
            codes = reference.encode(weight[0][0], dtype) if dtype == torch.float16 else (
                weight[0][0].to(dtype))  # fmt: skip
            stored = [(codes, *weight[0][1:]), *weight[1:]]
            for wanted in (stored[0], stored[1], stored[2], None):
                for i in range(3):
                    value = next(got)
                    if wanted is not None:
                        assert_same(value, wanted[i], f"{shape}, step {t}, part {i}")


def steps(p, chosen, grads, lr=1e-2):
    optimizer = qv.AdamW([p], lr=lr, recipe=chosen)
    for g in grads:
        p.grad = g
        optimizer.step()
    return optimizer


def test_a_remainder_makes_bf16_an_exact_f32_master():
    start = randn(50, 33, dtype=torch.bfloat16)
    grads = [randn(50, 33, seed=t, dtype=torch.bfloat16) for t in range(1, 9)]
    exact, half = nn.Parameter(start.float()), nn.Parameter(start.clone())
    steps(exact, with_states("e4m3-expand"), [g.float() for g in grads])

    def run():
        p = nn.Parameter(start.clone())
        optimizer = steps(p, with_states("e4m3-expand", bf16_master="remainder"), grads)
        return [p.detach(), optimizer.state[p]["remainder"]]

    high, low = everywhere(run)
    assert_same(reference.join_master(high, low), exact.detach())
    wanted = reference.split_master(exact.detach())
    assert_same(high, wanted[0])
    assert_same(low, wanted[1])
    assert half.dtype == torch.bfloat16


def test_8_bits_make_bf16_a_master_of_24_bits():
    start = randn(50, 33, dtype=torch.bfloat16)
    grads = [randn(50, 33, seed=t) for t in range(1, 9)]
    chosen = with_states("f32", bf16_master="remainder8")

    def run():
        p = nn.Parameter(start.clone())
        optimizer = qv.AdamW([p], lr=1e-2, recipe=chosen)
        for g in grads:
            p.grad = g.bfloat16()
            optimizer.step()
        return [p.detach(), optimizer.state[p]["remainder"]]

    high, low = everywhere(run)
    # The oracle: f32 AdamW whose weight is rounded to 24 bits after each step.
    exact = nn.Parameter(start.float())
    optimizer = qv.AdamW([exact], lr=1e-2, recipe="f32")
    for g in grads:
        exact.grad = g.bfloat16().float()
        optimizer.step()
        wanted = reference.split_master(exact.detach(), 8)
        exact.data.copy_(reference.join_master(*wanted))
    assert_same(high, wanted[0])
    assert_same(low, wanted[1])
    assert low.dtype == torch.int8


def test_24_bits_are_the_nearest_of_every_float_and_split_exactly():
    x = torch.cat([random_bits(100_000), torch.tensor([0.0, -0.0, INF, -INF, 3.4e38, 1e-45])])
    ties = [0x3F800080, 0x3F800180, 0x3F807F80, 0x3F808080, 0x7F7FFF80, -0x7F7FFE80, 0x00000080]
    x = torch.cat([x, torch.tensor(ties, dtype=torch.int64).to(torch.int32).view(torch.float32)])
    x = x[~x.isnan()]
    high, low = reference.split_master(x, 8)
    kept = reference.join_master(high, low)
    for a, b in zip(reference.split_master(kept, 8), (high, low), strict=True):
        assert_same(a, b)  # a kept value stays
    usual = x.isfinite() & (x.abs() >= 2**-126) & kept.isfinite()
    assert ((kept - x).abs() <= 2**-16 * x.abs())[usual].all()
    steps_away = torch.tensor([-256, 0, 256], dtype=torch.int32)
    neighbours = (kept.view(torch.int32)[:, None] + steps_away).view(torch.float32)
    error = (neighbours.double() - x.double()[:, None]).abs()[usual]
    assert (error[:, 1] <= error.nan_to_num(nan=INF).amin(1)).all()
    even = (kept.view(torch.int32) >> 8) % 2 == 0
    tied = x.view(torch.int32) % 256 == 128
    assert even[tied].all() and tied.sum() >= 5


def test_the_split_of_a_master_is_exact_for_every_float():
    x = torch.cat([random_bits(100_000), torch.tensor([0.0, -0.0, INF, -INF, 3.4e38, 1e-45])])
    x = torch.cat([x, torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF]).int().view(torch.float32)])
    x = x[~x.isnan()]
    high, low = reference.split_master(x)
    assert_same(reference.join_master(high, low), x)
    ordinary = (x.abs() < 3e38) & (x.abs() >= 2**-126)
    assert ((high.float() - x).abs() <= 2**-8 * x.abs())[ordinary].all()


def test_stochastic_rounding_is_the_oracles_and_unbiased():
    start = randn(40, 33, dtype=torch.bfloat16)
    other = nn.Parameter(torch.zeros(3))
    other.grad = torch.zeros(3)
    chosen = with_states("f32", bf16_master="stochastic")

    def run():
        p = nn.Parameter(start.clone())
        optimizer = qv.AdamW([other, p], *HYPER[:1], HYPER[1:3], *HYPER[3:], recipe=chosen)
        out = []
        for t in range(1, 4):
            p.grad = randn(40, 33, seed=t, dtype=torch.bfloat16)
            optimizer.step()
            out += state_of(optimizer, p)
        return out

    got = everywhere(run)
    w, m, v = start, torch.zeros(40, 33), torch.zeros(40, 33)
    one, none = torch.ones(()), torch.zeros(())
    for t in range(1, 4):
        stored = [(w.float(), one, none), (m, one, none), (v, one, none)]
        g = randn(40, 33, seed=t, dtype=torch.bfloat16)
        (w, _, _), (m, _, _), (v, _, _) = reference.adamw_fp8(stored, g, none, t, *HYPER)
        w = reference.stochastic_bf16(w, 2, t - 1)  # the second parameter
        assert_same(got[12 * (t - 1)], w, f"step {t}")
    # A step far below half an ulp: to nearest nothing would move; here the mean does.
    p = nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    qv.AdamW([p], lr=2**-12, weight_decay=0.0, recipe=chosen).step()
    moved = 1 - p.detach().double().mean().item()
    assert abs(moved / 2**-12 - 1) < 5 * 4 / math.sqrt(100_000)  # up by 2^-8 with chance 1/16


def test_rounding_errors_of_successive_steps_cancel():
    """A bf16 weight beside the same steps of an f32 one. With independent noise the errors are a
    random walk: their variance grows by ulp |update| a step, for updates below an ulp."""
    lr, steps = 1e-5, 400
    start = (randn(20_000).abs() * 0.001 + 0.02).bfloat16()  # of one binade: ulp 2^-13
    exact, rounded = nn.Parameter(start.float()), nn.Parameter(start.clone())
    options = {"lr": lr, "betas": HYPER[1:3], "weight_decay": 0.0}
    optimizers = [
        qv.AdamW([exact], **options, recipe="f32"),
        qv.AdamW([rounded], **options, recipe=with_states("f32", bf16_master="stochastic")),
    ]
    walk = 0.0
    for t in range(steps):
        exact.grad = randn(20_000, seed=t) + 0.2
        rounded.grad = exact.grad.bfloat16()
        before = exact.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
        walk += 2**-13 * (exact.detach() - before).abs().mean().item()
    error = (rounded.detach().float() - exact.detach()).square().mean().sqrt().item()
    assert error < 0.7 * math.sqrt(walk)


@pytest.mark.parametrize("name", ["e4m3-expand", "e5m2-expand", "e4m3", "e5m2", "e4m3-tensor"])
@pytest.mark.parametrize("beta1", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("second", ["f32", "e4m3-expand", "f16-tensor"])
def test_weights_that_get_no_more_gradient_come_to_rest(name, beta1, second):
    """Dead rows, and dead elements among live ones in one group. In exact arithmetic m / sqrt(v),
    at most the Cauchy-Schwarz peak, falls by beta1 / sqrt(beta2) a step, and a weight moves by the
    sum of that. A first moment that nearest rounding holds up would move it for ever, and faster as
    v falls. An encoded v is up to 2^-3 small, or larger, and then the step is smaller."""
    lr, beta2, stop, total = 1e-3, 0.999 if beta1 > 0.95 else 0.95, 30, 600
    torch.manual_seed(0)
    p = nn.Parameter(randn(64, 128) * 0.02)
    dead = torch.zeros(64, 128, dtype=torch.bool)
    dead[:8] = True
    dead[8:, ::5] = True
    optimizer = qv.AdamW(
        [p], lr=lr, betas=(beta1, beta2), weight_decay=0.0, recipe=with_states(name, second)
    )
    moved = []
    for t in range(total):
        p.grad = randn(64, 128, seed=t)
        if t >= stop:
            p.grad[dead] = 0
        if t in (stop, total - 100):
            moved.append(p.detach()[dead].clone())
        optimizer.step()
    c1 = 1 - beta1 ** (stop + 1)
    peak = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2)) / c1
    bound = lr * peak / (1 - beta1 / math.sqrt(beta2)) * 1.07
    now = p.detach()[dead]
    assert (now - moved[0]).abs().max() < bound
    # And they are at rest: the last hundred steps moved them by less than one step of theirs.
    assert (now - moved[1]).abs().max() < lr
    first = optimizer.state[p]["exp_avg"]
    m = first.dequantize() if isinstance(first, ScaledTensor) else first
    assert m[dead].abs().max() < 0.01 * m[~dead].abs().max()


@pytest.mark.parametrize("name", ["e4m3-expand", "e5m2-expand", "e4m3", "e5m2"])
def test_tiny_second_moments_among_large_ones_never_vanish(name):
    """A gradient of 1e-6 beside one of 1: m is stored, v would be flushed to zero, and m / eps is a
    step of 100 learning rates."""
    p = nn.Parameter(torch.zeros(128))
    g = torch.full((128,), 1e-6)
    g[::16] = 1.0
    optimizer = steps(p, with_states("f32", name), [g] * 20, lr=1e-3)
    v = optimizer.state[p]["exp_avg_sq"].dequantize()
    assert (v > 0).all()
    assert p.detach().abs().max() < 20 * 1e-3 * 1.2


@pytest.mark.parametrize("shape", [(300, 144), (64, 48), (129, 96)])
def test_copies_and_groups_in_one_pass(shape):
    """Strips of rows that a thread transposes are whole groups, whatever the width."""
    start, g = randn(*shape), randn(*shape, seed=1)

    def run():
        p = qv.quantize(start, torch.float16)
        m, v = (STATES["e4m3-expand"].zeros(start) for _ in range(2))
        row, col, scale = (
            torch.zeros(shape, dtype=E4M3),
            torch.zeros(shape[::-1], dtype=E4M3),
            torch.ones(()),
        )
        qv.ops.adam_(
            [p], [m], [v], [g], grad_amax=g.abs().amax()[None],
            steps=[torch.zeros((), dtype=torch.int64)],
            hyper=torch.tensor([HYPER], dtype=torch.float64),
            skipped=torch.zeros((), dtype=torch.int64),
            copies=[(row, col, scale)], scalings=[0, 2, 2],
        )  # fmt: skip
        return [p.qdata, p.scale, m.qdata, m.scale, v.qdata, v.scale, row, col]

    got = everywhere(run)
    first = qv.quantize(start, torch.float16)
    zero = parts_of(STATES["e4m3-expand"].zeros(start))
    wanted = reference.adamw_fp8(
        [parts_of(first), zero, zero], g, g.abs().amax(), 1, *HYPER, ("tensor", "expand", "expand")
    )
    flat = [part for state in wanted for part in state[:2]]
    for a, b in zip(got[:6], flat, strict=True):
        assert_same(a, b)
    assert_same(got[6], reference.fp8_weight(got[0], got[1])[0])
    assert_same(got[7], got[6].t().contiguous())
