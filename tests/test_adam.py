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


def adam(params, ms, vs, grads, numbers=HYPER, steps=None, skipped=None, **options):
    """The op on lists of tensors; returns the step and skip counters."""
    n = len(params)
    steps = [torch.zeros((), dtype=torch.int64) for _ in params] if steps is None else steps
    skipped = torch.zeros((), dtype=torch.int64) if skipped is None else skipped
    options.setdefault("grad_amax", qv.ops.grad_norm(grads)[1])
    options.setdefault("hyper", torch.tensor([numbers] * n, dtype=torch.float64))
    qv.ops.adam_(params, ms, vs, grads, steps=steps, skipped=skipped, **options)
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


@pytest.mark.parametrize("first_element", [0, 3, 1001])
@pytest.mark.parametrize("moment", [E4M3, FP8[1], torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(), (3, 5), (257, 130)])
def test_stochastic_rounding_is_its_oracle_bit_for_bit(shape, moment, first_element):
    def run():
        w = make(randn(*shape, seed=1), torch.float16)
        m, v = (torch.zeros(shape) if d == torch.float32 else zeros(shape, d)
                for d in (moment, torch.float16))  # fmt: skip
        steps, out = None, []
        for t in range(1, 5):
            g = randn(*shape, seed=t) * 10.0 ** -(t % 3)
            options = {"seeds": [7], "first_elements": [first_element]}
            steps, _ = adam([w], [m], [v], [g], steps=steps, **options)
            out += [part for state in (w, m, v) for part in parts_of(state)]
        return out

    got = everywhere(run)
    stored = [parts_of(make(randn(*shape, seed=1), torch.float16)), None, None]
    for i, d in ((1, moment), (2, torch.float16)):
        stored[i] = parts_of(torch.zeros(shape) if d == torch.float32 else zeros(shape, d))
    for t in range(1, 5):
        g = randn(*shape, seed=t) * 10.0 ** -(t % 3)
        top = qv.ops.grad_norm([g])[1][0]
        stored = reference.adamw_fp8(stored, g, top, t, *HYPER, seed=7, first=first_element)
        wanted = [part for state in stored for part in state]
        for i, (a, b) in enumerate(zip(got[9 * (t - 1) :], wanted, strict=False)):
            if not (moment == torch.float32 and i in (4, 5)):  # no scale, no amax
                assert_same(a, b, f"step {t}, part {i}")


def test_a_constant_gradient_moves_masters_by_lr_a_step():
    """At 5e-7, where to nearest nothing moves: a step is 2^-5 of an f16 ulp of these weights."""
    start, g = randn(128, 256) * 0.02, randn(128, 256, seed=1)
    wanted = 300 * 5e-7
    for weight in (torch.float16, torch.bfloat16):
        for moments in ((E4M3, torch.float16), (torch.float32, torch.float32)):
            for seed, low, high in ((3, 0.95, 1.05), (-1, 0.0, 0.2)):
                w = scaled(start, weight) if weight == torch.float16 else start.bfloat16()
                before = parts_of(w)
                m, v = (torch.zeros(start.shape) if d == torch.float32 else zeros(start.shape, d)
                        for d in moments)  # fmt: skip
                steps = None
                for _ in range(300):
                    hyper = (5e-7, 0.9, 0.95, 1e-8, 0.0)
                    steps, _ = adam([w], [m], [v], [g], hyper, steps, seeds=[seed])
                (old, old_scale, _), (new, scale, _) = before, parts_of(w)
                moved = (old.double() * old_scale - new.double() * scale) * g.sign()
                assert low < moved.mean().item() / wanted < high


def test_decay_alone_shrinks_masters():
    """lr * weight_decay = 1e-4 for 300 steps: 0.9999^300 = 0.9704."""
    start, none = randn(128, 256) * 0.02, torch.zeros(128, 256)
    for weight in (torch.float16, torch.bfloat16):
        w = scaled(start, weight) if weight == torch.float16 else start.bfloat16()
        before = parts_of(w)
        m, v = none.clone(), none.clone()
        steps = None
        for _ in range(300):
            steps, _ = adam([w], [m], [v], [none], (1e-3, 0.9, 0.95, 1e-8, 0.1), steps, seeds=[5])
        (old, old_scale, _), (new, scale, _) = before, parts_of(w)
        old, new = old.double() * old_scale, new.double() * scale
        assert abs((old * new).sum() / (old * old).sum() - 0.970) < 0.003


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
        adam([w], [m], [v], [randn(*shape, seed=2)], copies=[(row, col, scale)], seeds=[9])
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
        m, v = ([zeros(shape, dtype) for _ in range(2)] for dtype in (E4M3, torch.float16))
        codes, scale = torch.zeros(shape, dtype=E4M3), torch.zeros(())
        copies = [tuple(t.clone() for t in (codes, codes, scale)) for _ in range(2)]
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
    a = ([w], [m], [v], [g])
    cases = [
        (([zeros((4, 4), E4M3)], [m], [v], [g]), {}, "weight must be f32, bf16 or f16, got e4m3"),
        (([w], [m.qdata], [v], [g]), {}, "exp_avg is e4m3 and needs a scale and an amax"),
        (([w], [g.bfloat16()], [v], [g]), {}, "exp_avg must be f32, f16, e4m3 or e5m2, got bf16"),
        (([w], [zeros((4, 5), E4M3)], [v], [g]), {}, "exp_avg has 20 values, its parameter 16"),
        (([w], [m], [v], [randn(4, 3)]), {}, "grad has 12 values, its parameter 16"),
        (a, {"copies": [(row, row.clone().t(), one)]}, "must be contiguous"),
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
        (a, {"steps": [torch.zeros(())]}, "step must be one int64"),
        (a, {"steps": [torch.tensor(2**63 - 1)]}, r"step count must be in \[0"),
        (a, {"steps": [torch.tensor(-1)]}, r"in \[0, 2\^63 - 1\), got -1"),
        (a, {"steps": []}, "wanted 0 values, got 3"),
        (a, {"skipped": torch.zeros(2, dtype=torch.int64)}, "skipped must be"),
        (a, {"grad_amax": torch.ones(2)}, "grad_amax must be 1 float32, got 2"),
        (a, {"grad_amax": torch.ones(1).double()}, "float32, got 1 of Double"),
        (a, {"hyper": torch.ones(1, 5)}, "hyper must be contiguous"),
        (a, {"seeds": [1, 2]}, "wanted 1 seeds, got 2"),
        (a, {"scalings": [0]}, "wanted 3 scalings, got 1"),
        (a, {"first_elements": [-4]}, "first_element must not be negative"),
        (a, {"remainders": [torch.zeros(4, 4, dtype=torch.int16)]},
         "a remainder goes with a bf16 weight, got f16"),
        (([g.clone()], [g * 0], [g * 0], [g]), {"seeds": [1]}, "bf16 or f16 weight, got f32"),
        (([g.bfloat16()], [g * 0], [g * 0], [g]),
         {"remainders": [torch.zeros(4, 8, dtype=torch.int16)[:, ::2]]}, "contiguous int16"),
        (([g.clone()], [g.t()], [g * 0], [g]), {}, "exp_avg must be contiguous"),
        (([g.double()], [g * 0], [g * 0], [g]), {"grad_amax": torch.ones(1)}, "got Double"),
    ]  # fmt: skip
    for arguments, options, message in cases:
        with pytest.raises(REFUSAL, match=message):
            adam(*arguments, **options)


def test_a_scale_and_an_amax_come_together():
    """The C++ types allow for a scale alone; a list entry that is empty stands for none."""
    none, one = torch.empty(0), torch.ones(())
    x = randn(4, 4)

    def step(scales, amaxes, values=None):
        values = values or [x.clone(), x * 0, x * 0]
        torch.ops.quaver.adam_(
            values, scales, amaxes, [x], [none], torch.ones(1),
            [torch.zeros((), dtype=torch.int64)],
            torch.tensor([HYPER], dtype=torch.float64), torch.zeros((), dtype=torch.int64),
            [], [], [],
        )  # fmt: skip

    step([none] * 3, [none] * 3)
    f16 = [x.half(), x.half() * 0, x.half() * 0]
    step([one.clone() for _ in range(3)], [one.clone() for _ in range(3)], f16)
    for k, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        scales = [one.clone() if i == k else none for i in range(3)]
        with pytest.raises(REFUSAL, match=f"{name} is f32 and takes neither a scale nor an amax"):
            step(scales, [none] * 3)
        amaxes = [one.clone() if i != k else none for i in range(3)]
        with pytest.raises(REFUSAL, match=f"{name} is f16 and needs a scale and an amax"):
            step([one.clone() for _ in range(3)], amaxes, f16)
    with pytest.raises(REFUSAL, match="only an f16 weight has a scale, and then an amax too"):
        step([one.clone() for _ in range(3)], [none, one, one.clone()], f16)


@pytest.mark.parametrize("kind", ["strided", "expanded", "reversed rows"])
def test_a_gradients_amaxes_may_be_any_view(kind):
    """Read element by element, past its end a strided one would find another's memory."""
    g = [randn(3), randn(5)]
    views = {
        "strided": torch.tensor([1.0, INF, 1.0, INF])[::2],
        "expanded": torch.ones(1).expand(2),
        "reversed rows": torch.tensor([[1.0, INF], [1.0, NAN]])[:, 0],
    }
    params = [torch.zeros(3), torch.zeros(5)]
    m, v = ([torch.zeros(3), torch.zeros(5)] for _ in range(2))
    _, skipped = adam(params, m, v, g, grad_amax=views[kind])
    assert skipped.item() == 0 and params[1].all()


def test_tensors_of_two_devices_are_refused():
    g = randn(4, 4)
    with pytest.raises(REFUSAL, match=r"one device|must be on cpu"):
        adam([g.clone()], [g.to("meta")], [g * 0], [g])
    with pytest.raises(REFUSAL, match=r"one device|must be on cpu"):
        adam(
            [g.clone()],
            [g * 0],
            [g * 0],
            [g],
            skipped=torch.zeros((), dtype=torch.int64).to("meta"),
        )
