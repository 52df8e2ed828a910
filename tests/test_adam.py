"""The op `adam_`, bit for bit against its oracle."""

import pytest
import torch
from helpers import FP8, REFUSAL, assert_same, everywhere, parts_of, randn

import quaver as qv
from quaver import ScaledTensor, reference

E4M3 = FP8[0]
HYPER = (1e-2, 0.9, 0.95, 1e-8, 0.1)  # lr, betas, eps, weight decay
INF, NAN = float("inf"), float("nan")


def scaled(x, dtype):
    return qv.quantize(x, dtype)


def zeros(shape, dtype):
    one = torch.ones(())
    return ScaledTensor(torch.zeros(shape, dtype=dtype), one, torch.zeros(()))


def adam(params, ms, vs, grads, hyper=HYPER, copies=None, steps=None, skipped=None):
    """The op on lists of tensors; returns the step and skip counters."""
    none = torch.empty(0)
    n = len(params)
    steps = [torch.zeros((), dtype=torch.int64) for _ in params] if steps is None else steps
    skipped = torch.zeros((), dtype=torch.int64) if skipped is None else skipped
    copies = copies or [(none, none, none)] * n
    values, scales, _ = qv.ops.parts(grads)
    torch.ops.quaver.adam_(
        *qv.ops.parts(params),
        *qv.ops.parts(ms),
        *qv.ops.parts(vs),
        values,
        scales,
        qv.ops.grad_norm(grads)[1],
        *([c[i] for c in copies] for i in range(3)),
        steps,
        torch.tensor([hyper] * n, dtype=torch.float64),
        skipped,
        [],
    )
    return steps, skipped


def assert_states(tensors, wanted, what):
    for name, t, w in zip(("weight", "exp_avg", "exp_avg_sq"), tensors, wanted, strict=True):
        got = parts_of(t)
        for part, a, b in zip(("values", "scale", "amax"), got, w, strict=True):
            if isinstance(t, ScaledTensor) or part == "values":
                assert_same(a, b, f"{what}: {name} {part}")


CODECS = [
    (torch.float16, E4M3, torch.float16),  # O2
    (torch.float16, torch.float32, torch.float32),  # O1
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
]


def make(x, dtype):
    return scaled(x, dtype) if dtype in (*FP8, torch.float16) else x.to(dtype)


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, E4M3])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (257, 130)])
def test_the_op_is_its_oracle_bit_for_bit(codecs, grad, shape):
    for hyper in (HYPER, (1e-3, 0.0, 0.999, 1e-6, 0.0), (0.5, 0.9, 0.999, 1e-15, 0.5)):
        w = make(randn(*shape, seed=1), codecs[0])
        m, v = (zeros(shape, d) if d != torch.float32 else torch.zeros(shape) for d in codecs[1:])
        steps = [torch.zeros((), dtype=torch.int64)]
        for t in range(1, 7):
            g = randn(*shape, seed=t) * 10.0 ** -(t % 4)
            g = scaled(g, E4M3) if grad == E4M3 else g.to(grad)
            value = g.dequantize() if isinstance(g, ScaledTensor) else g
            top = qv.ops.grad_norm([g])[1][0]
            wanted = reference.adamw_fp8(
                [parts_of(w), parts_of(m), parts_of(v)], value, top, t, *hyper
            )
            adam([w], [m], [v], [g], hyper, steps=steps)
            assert_states((w, m, v), wanted, f"step {t}")
            assert steps[0].item() == t


@pytest.mark.parametrize("shape", [(16, 16), (64, 48), (130, 70), (1, 33), (200, 1)])
def test_the_gemm_copies_come_out_of_the_same_pass(shape):
    def step():
        w, m, v = (
            scaled(randn(*shape), torch.float16),
            zeros(shape, E4M3),
            zeros(shape, torch.float16),
        )
        row, col = torch.zeros(shape, dtype=E4M3), torch.zeros(shape[::-1], dtype=E4M3)
        scale = torch.zeros(())
        adam([w], [m], [v], [randn(*shape, seed=2)], copies=[(row, col, scale)])
        wanted_row, wanted_scale = reference.fp8_weight(w.qdata, w.scale)
        assert_same(row, wanted_row)
        assert_same(col, wanted_row.t().contiguous())
        assert_same(scale, wanted_scale)
        return [w.qdata, m.qdata, v.qdata, row, col]

    everywhere(step)


def test_many_parameters_are_each_their_own():
    shapes = [(300, 7), (), (0, 4), (40000,), (64, 64), (5,)]
    kinds = (torch.float16, E4M3, torch.float16, torch.float32)

    def lists():
        w, m, v, g = ([make(randn(*s), kind) for s in shapes] for kind in kinds)
        for t in v:
            t.qdata.abs_()
        return w, m, v, g

    together = lists()
    adam(*together)
    alone = lists()
    for i in range(len(shapes)):
        adam(*([one[i]] for one in alone))
    for i in range(len(shapes)):
        assert_states([x[i] for x in alone[:3]], [parts_of(x[i]) for x in together[:3]], shapes[i])


def test_nothing_changes_when_any_gradient_is_not_finite():
    shape = (40, 40)
    for bad in (INF, -INF, NAN):
        w = [scaled(randn(*shape, seed=i), torch.float16) for i in range(2)]
        m, v = [zeros(shape, E4M3)] * 2, [zeros(shape, torch.float16)] * 2
        copies = [(torch.zeros(shape, dtype=E4M3),) * 2 + (torch.zeros(()),)] * 2
        g = [randn(*shape), randn(*shape)]
        g[1][39, 39] = bad
        for grads in (g, [g[0], scaled(g[1], E4M3)]):
            before = [parts_of(t) for t in w]
            steps, skipped = adam(w, m, v, grads, copies=copies)
            assert skipped.item() == 1
            assert [s.item() for s in steps] == [0, 0]
            for t, b in zip(w, before, strict=True):
                for x, y in zip(parts_of(t), b, strict=True):
                    assert_same(x, y)
            assert not copies[0][0].float().any()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.91), (0.0, 0.9)])
def test_the_bound_of_an_update_holds(betas):
    """Whatever gradients come, an exact Adam never moves a weight by more than its bound."""
    hyper = (1.0, *betas, 0.0, 0.0)
    patterns = [
        torch.ones(60),
        torch.zeros(60),
        2.0 ** torch.arange(60),
        2.0 ** -torch.arange(60.0),
    ]
    patterns[1][0] = 1
    patterns += [(max(betas[0], 0.1) / betas[1]) ** -torch.arange(30.0), randn(60)]
    for pattern in patterns:
        w = m = v = torch.zeros(())
        for t, g in enumerate(pattern, 1):
            new, m, v = reference.adamw(w, m, v, g, t, *hyper)
            moved = (new - w).abs().item() if v > 0 else 0.0
            assert moved <= reference.update_bound(t, 1.0, *betas) * (1 + 1e-9)
            w = new


def test_the_op_refuses_by_name():
    w, m, v, g = (
        scaled(randn(4, 4), torch.float16),
        zeros((4, 4), E4M3),
        zeros((4, 4), torch.float16),
        randn(4, 4),
    )
    row = torch.zeros(4, 4, dtype=E4M3)
    one = torch.ones(())
    cases = [
        (([m], [m], [v], [g]), {}, "weight must be f32, bf16 or f16, got e4m3"),
        (([w], [m.qdata], [v], [g]), {}, "exp_avg is e4m3 and needs a scale and an amax"),
        (([w], [g.bfloat16()], [v], [g]), {}, "exp_avg must be f32, f16, e4m3 or e5m2, got bf16"),
        (([w], [zeros((4, 5), E4M3)], [v], [g]), {}, "exp_avg has 20 values, its parameter 16"),
        (([w], [m], [v], [randn(4, 3)]), {}, "grad has 12 values, its parameter 16"),
        (([w], [m], [v], [g]), {"copies": [(row, row.t(), one)]}, "must be contiguous"),
        (
            ([g.clone()], [g * 0], [g * 0], [g]),
            {"copies": [(row, row.clone(), one)]},
            "an FP8 copy goes with a scaled f16 weight, got f32",
        ),
        (
            ([w], [m], [v], [g]),
            {"copies": [(row, row[:2].clone(), one)]},
            "FP8 copies must be",
        ),
        (
            ([w], [m], [v], [g]),
            {"copies": [(row.to(FP8[1]), row.to(FP8[1]), one)]},
            "FP8 copies must be e4m3",
        ),
        (([randn(4, 4).t()], [g * 0], [g * 0], [g]), {}, "weight must be contiguous"),
        (([w], [m], [v], [g]), {"steps": [torch.zeros(())]}, "step must be one int64"),
    ]  # fmt: skip
    for arguments, options, message in cases:
        with pytest.raises(REFUSAL, match=message):
            adam(*arguments, **options)


# --- qv.AdamW ---------------------------------------------------------------------------------
