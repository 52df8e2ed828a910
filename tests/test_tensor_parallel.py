"""Tensor and sequence parallelism over real processes, against the model in one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FP8, assert_same
from rank_pool import run
from tensor_parallels import DY, PLAN, Mlp, X, mlp, plain, whole_gradients
from torch import nn

import quaver as qv
from quaver.distributed import Transport
from quaver.distributed import tensor_parallel as tp
from quaver.distributed.tensor_parallel import sequence
from quaver.nn.weight import cast_weight

E4M3, E5M2 = FP8
F32 = 2.0**-24


def mlp_on_a_rank(rank, name, fp8_sum, regather):
    transport = Transport()
    model = tp.parallelize(mlp(name), transport, PLAN, fp8_sum=fp8_sum, regather=regather)
    x = sequence.own(X, transport).requires_grad_()
    y = model(x)
    y.backward(sequence.own(DY, transport))
    whole = sequence.gather(y.detach(), transport), sequence.gather(x.grad, transport)
    return *whole, whole_gradients(model)


def mlp_alone(name):
    model = mlp(name)
    x = X.clone().requires_grad_()
    y = model(x)
    y.backward(DY)
    return y.detach(), x.grad, {n: plain(p.grad) for n, p in model.named_parameters()}


def parts_of_products(name, ranks):
    """f64 [ranks, rows, columns]: what the ranks sum, forward and backward, and the tensors that
    are multiplied, from the model in one process."""
    model = mlp(name)
    x = X.clone().requires_grad_()
    hidden = model.up(x)
    hidden.retain_grad()
    act = F.gelu(hidden)
    model.down(act).backward(DY)

    def product(a, weight, scale, dtype):
        a = qv.quantize(a.reshape(-1, a.shape[-1]), dtype)
        a, w = a.dequantize().double(), weight.double() * scale.double()
        runs = zip(a.chunk(ranks, 1), w.chunk(ranks, 1), strict=True)
        return torch.stack([p @ q.t() for p, q in runs]), a.abs() @ w.abs().t(), w

    down, down_scale = cast_weight(model.down.weight, E4M3, both=False)[:2]
    up, up_scale = cast_weight(model.up.weight, E4M3, both=False)[:2]
    forward = product(act.detach(), down, down_scale, E4M3)
    backward = product(hidden.grad, up.t(), up_scale, E5M2)
    return (*forward, act.detach()), (*backward, hidden.grad)


def step_of(x, dtype):
    """The smallest step of x's FP8 codes."""
    return qv.quantize(x, dtype).scale * (2.0**-9 if dtype == E4M3 else 2.0**-16)


def bound(parts, magnitude, weight, operand, dtype, wire):
    """Of a sum over ranks against one product. In f32: the order of summation. A rank's own scale
    keeps values below the whole tensor's normal range better: by at most half the smallest step,
    against which one process errs by as much. In FP8: each part by half an ulp, or half a step."""
    k = weight.shape[1]
    total = 4 * k * F32 * magnitude + step_of(operand, dtype) * weight.abs().sum(1)
    if wire is not None:
        half, step = (2.0**-4, 2.0**-9) if wire == E4M3 else (2.0**-3, 2.0**-16)
        largest = parts.abs().max() + total.max()
        total = total * (1 + half) + (parts.abs() * half).sum(0)
        total = total + len(parts) * step / 2 * 2 * largest / torch.finfo(wire).max
    return total


# Current scaling and f32 gradients show the arithmetic; O2 is what is trained with.
@pytest.mark.parametrize("name", ["tensorwise", "fp8lm-o2"])
@pytest.mark.parametrize(
    ("ranks", "fp8_sum", "regather"),
    [(2, False, None), (2, True, True), (4, False, False), (4, True, None)],
)
def test_column_then_row(name, ranks, fp8_sum, regather):
    results = run(ranks, mlp_on_a_rank, name, fp8_sum, regather)
    y, dx, gradients = results[0]
    wanted_y, wanted_dx, wanted = mlp_alone(name)
    forward, backward = parts_of_products(name, ranks)
    limit = bound(*forward, E4M3, E4M3 if fp8_sum else None)
    assert ((y - wanted_y).reshape(limit.shape).abs() <= limit).all()
    limit = bound(*backward, E5M2, E5M2 if fp8_sum else None)
    assert ((dx - wanted_dx).reshape(limit.shape).abs() <= limit).all()
    # The products are those of one process, except for a rank's own scale, as in `bound`. e4m3
    # gradients may err by half an ulp each, or half a step, besides.
    act, hidden_grad = forward[-1], backward[-1]
    own_scale = {
        "up.weight": step_of(hidden_grad, E5M2) * X.abs().sum((0, 1)),
        "down.weight": step_of(act, E4M3) * DY.abs().sum((0, 1))[:, None],
    }
    for key, gradient in gradients.items():
        w = wanted[key]
        limit = own_scale.get(key, 0) + 100 * F32 * w.abs().max()
        if name == "fp8lm-o2" and key.endswith("weight"):
            limit = limit * (1 + 2.0**-3) + 2.0**-3 * w.abs() + step_of(w, E4M3)
        assert ((gradient - w).abs() <= limit).all(), key
    for other_y, other_dx, other in results[1:]:
        assert_same(other_y, y)
        assert_same(other_dx, dx)
        assert_same(other["down.bias"], gradients["down.bias"])  # replicated


class NormMlp(Mlp):
    """A norm that hands FP8 to the layer behind it, under coat."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)

    def forward(self, x):
        return super().forward(self.norm(x))


def norm_mlp():
    torch.manual_seed(0)
    return qv.convert(NormMlp(), recipe="coat")


def norm_mlp_on_a_rank(rank):
    transport = Transport()
    model = tp.parallelize(norm_mlp(), transport, PLAN | {"norm": tp.SequenceParallel()})
    assert isinstance(model.norm, qv.nn.norm.Norm)  # it does hand over FP8
    x = sequence.own(X, transport).requires_grad_()
    y = model(x)
    y.backward(sequence.own(DY, transport))
    whole = sequence.gather(y.detach(), transport), sequence.gather(x.grad, transport)
    return *whole, whole_gradients(model)


def test_a_norm_that_hands_over_fp8_before_a_gather():
    """coat's norm has a scale of its own on each rank, and the gather casts again with that of all.
    Both are powers of two: only values below the smallest normal change, and a gradient in bf16 by
    one rounding."""
    model = norm_mlp()
    x = X.clone().requires_grad_()
    y = model(x)
    y.backward(DY)
    wanted = [y.detach(), x.grad, *(plain(p.grad) for _, p in sorted(model.named_parameters()))]
    for got in run(2, norm_mlp_on_a_rank):
        found = [*got[:2], *(g for _, g in sorted(got[2].items()))]
        for mine, alone in zip(found, wanted, strict=True):
            off = (mine.float() - alone.float()).norm() / alone.float().norm()
            assert off < 2.0**-9, off


def infinity_on_a_rank(rank):
    """An input that is not finite on one rank alone is seen by all, saturation or not."""
    model = tp.parallelize(mlp("fp8lm-o2"), dist.group.WORLD, PLAN)
    x = sequence.own(X, Transport())
    if rank == 1:
        x[0, 0, 0] = float("inf")
    return model(x).isnan().all().item()


def test_an_infinity_on_one_rank_reaches_all():
    assert all(run(2, infinity_on_a_rank))
