"""Tensor parallelism with scales of rows and blocks: the codes that ranks exchange."""

from dataclasses import replace

import pytest
import torch
from helpers import FP8, bits, randn
from rank_pool import run
from torch import nn

import quaver as qv
from quaver import recipe
from quaver.distributed import Transport
from quaver.distributed import tensor_parallel as tp
from quaver.distributed.tensor_parallel import sequence

# More than a block along each axis that a rank holds, and no axis a multiple of one.
TOKENS, WIDTH, HIDDEN, OUT = (2, 80), 320, 544, 160
PLAN = {"0": tp.ColumnParallel(), "1": tp.RowParallel()}


def model(name):
    torch.manual_seed(0)
    return qv.convert(
        nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)), name, skip=()
    )


def step(net, x, dy):
    x = x.clone().requires_grad_()
    y = net(x)
    y.backward(dy)
    return y.detach(), x.grad


def data():
    spread = torch.logspace(-3, 3, WIDTH)[torch.randperm(WIDTH, generator=torch.Generator())]
    return randn(*TOKENS, WIDTH, seed=1) * spread, randn(*TOKENS, OUT, seed=2)


def on_a_rank(rank, name, regather):
    link = Transport()
    net = tp.parallelize(model(name), link, PLAN, regather=regather)
    x, dy = data()
    y, dx = step(net, sequence.own(x, link), sequence.own(dy, link))
    sent = link.traffic["activation"]
    grads = [tp.state.join(p.grad, p.shard) for p in (net[0].weight, net[1].weight)]
    return sequence.gather(y, link), sequence.gather(dx, link), *grads, sent


@pytest.mark.parametrize("name", ["rowwise", "blockwise"])
@pytest.mark.parametrize(("ranks", "regather"), [(2, True), (2, False), (4, None)])
def test_products_and_bytes(name, ranks, regather):
    net = model(name).double()
    exact = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)).double()
    exact.load_state_dict(net.state_dict())
    x, dy = (t.double() for t in data())
    wanted = [*step(exact, x, dy), exact[0].weight.grad, exact[1].weight.grad]
    results = run(ranks, on_a_rank, name, regather)
    scales = 4 if name == "rowwise" else 4 * -(-WIDTH // 128)
    for *found, sent in results:
        for what, mine, true in zip(("y", "dx", "dw0", "dw1"), found, wanted, strict=True):
            # A code of 3 bits errs by at most 2^-4, evenly spread: by 2^-4 / sqrt(3) in the root
            # of the mean square. Two products of two operands each lie behind one another, and one
            # operand of dw has been cast once more.
            off = ((mine.double() - true).norm() / true.norm()).item()
            assert off < 2.0**-4 / 3**0.5 * 5**0.5, (what, off)
        gathers = 2 if regather or ranks > 2 else 1
        tokens = TOKENS[0] * TOKENS[1] * (ranks - 1) // ranks
        gradients = OUT + (4 if name == "rowwise" else 4 * -(-OUT // 128))
        sums = 4 * (OUT + WIDTH)
        assert sent == tokens * (gathers * (WIDTH + scales) + gradients + sums)


@pytest.mark.parametrize("grain", ["row", "block"])
def test_a_second_cast_between_powers_of_two_changes_no_mantissa(grain):
    x = randn(160, 320, seed=3).exp()  # in the range in which no code is subnormal
    codes, scale = sequence.shared_cast(x, FP8[0], None, None, grain)
    decoded = torch.ops.quaver.dequantize(codes, scale, torch.float32, grain, 128)
    q, scale_t = sequence.transposed(codes, scale, grain)
    again = torch.ops.quaver.dequantize(q, scale_t, torch.float32, grain, 128)
    assert torch.equal(again[:320, :160].t(), decoded)
    assert torch.equal(bits(scale_t) & 0x7FFFFF, torch.zeros_like(bits(scale_t)))


def test_values_that_are_not_finite_spread():
    x = randn(32, 64, seed=3)
    x[3, 5] = torch.inf
    _, scale = sequence.shared_cast(x, FP8[0], None, None, "block")
    assert scale.isnan().flatten().tolist() == [row == 3 for row in range(32)]


def refused(rank):
    base = recipe.get("blockwise")
    chosen = replace(base, linear=replace(base.linear, weight_product="bf16"))
    with pytest.raises(ValueError, match=r'0 multiplies .* gradient in bf16.*"fp8"'):
        tp.parallelize(model(chosen), Transport(), PLAN)
    return True


def test_weight_gradients_in_bf16_are_refused():
    assert all(run(2, refused))
