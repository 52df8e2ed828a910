"""ScaledTensor: to generic code a tensor of its logical dtype, stored as codes and scales."""

import copy
import io

import pytest
import torch
from helpers import FP8, assert_same, bits, randn
from torch import nn

import quaver as qv
from quaver import ScaledTensor
from quaver.layout import Layout

E4M3, E5M2 = FP8
KINDS = [E4M3, E5M2, torch.float16]


def make(kind=E4M3, shape=(6, 10), seed=0, granularity="tensor", source=torch.float32):
    return qv.quantize(randn(*shape, seed=seed).to(source), kind, granularity=granularity, block=4)


def assert_equal_tensors(a, b):
    assert isinstance(a, ScaledTensor)
    assert (a.dtype, a.qlayout) == (b.dtype, b.qlayout)
    for name in ("qdata", "scale", "amax"):
        assert_same(getattr(a, name), getattr(b, name), name)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_it_looks_like_its_logical_dtype(source):
    t = make(source=source)
    assert t.dtype == source and t.shape == (6, 10) and t.device.type == "cpu"
    assert t.dequantize().dtype == source
    assert t.dequantize(torch.float64).dtype == torch.float64
    assert_same(qv.dequantize(t), t.dequantize())
    assert "e4m3" in repr(t) and repr(t) == str(t)


def test_unknown_ops_see_the_decoded_value():
    t, u = make(), make(seed=1)
    x, y = t.dequantize(), u.dequantize()
    for op in (
        lambda a, b: a * 2 - b,
        lambda a, b: a @ b.t(),
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.stack([a, b], dim=1),
        lambda a, b: a.sum(0),
        lambda a, b: a[1:4, ::2] + 0,
        lambda a, b: a.norm(),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch._foreach_add([a, b], [b, a])[1],
        lambda a, b: torch.nn.functional.linear(a, b),
        lambda a, b: torch.zeros_like(a),
        lambda a, b: a.new_ones(3),
        lambda a, b: a.to(torch.bfloat16) + 0,
    ):
        got = op(t, u)
        assert type(got) is torch.Tensor
        assert_same(got, op(x, y))
        assert_same(op(t, y), op(x, y))  # mixed
    assert torch.equal(t, x) and torch.allclose(x, t)
    assert t[2, 3].item() == x[2, 3].item()
    assert len(t) == 6 and [r.shape for r in t] == [(10,)] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_ops_encode_their_result(kind):
    for op in (
        lambda a: a.add_(1.5),
        lambda a: a.clamp_(-0.5, 0.5),
        lambda a: a.fill_(3.0),
        lambda a: a.copy_(torch.arange(60.0).view(6, 10)),
        lambda a: a.copy_(torch.tensor(2.0)),
        lambda a: a.lerp_(torch.ones(6, 10), 0.5),
        lambda a: a.mul_(torch.arange(10.0)),
        lambda a: a.masked_fill_(torch.eye(6, 10, dtype=torch.bool), 7.0),
        lambda a: nn.init.constant_(a, 0.25),
        lambda a: a.zero_(),
        lambda a: torch._foreach_add_([a], 1.0),
        lambda a: torch._foreach_lerp_([a], [torch.ones(6, 10)], 0.1),
        lambda a: torch.add(a, 1.0, out=a),
    ):
        t = make(kind)
        plain = t.dequantize()
        before = t.qdata
        out = op(t)
        op(plain)
        assert t.qdata is before  # the same storage
        if kind == torch.float16:  # arithmetic rounds stochastically: by less than a code
            torch.testing.assert_close(t.dequantize(), plain, rtol=2.0**-10, atol=2.0**-24)
        else:
            assert_same(t.dequantize(), qv.quantize(plain, kind).dequantize())
        assert t.amax == plain.abs().max()
        assert out is t or not isinstance(out, torch.Tensor)


def test_in_place_ops_on_bf16_keep_the_amax():
    t = ScaledTensor(randn(6, 10).bfloat16(), torch.ones(()), torch.zeros(()))
    for op in (lambda a: a.fill_(7.0), lambda a: a.mul_(torch.arange(10.0)), lambda a: a.add_(1.0)):
        op(t)
        assert t.amax == t.dequantize().abs().max()
    t.masked_fill_(torch.eye(6, 10, dtype=torch.bool), float("nan"))
    assert t.amax.isnan()


@pytest.mark.parametrize("index", [0, (slice(None), 3), (slice(2, 5), slice(1, 4)), ...])
def test_writing_to_a_part_encodes_the_whole_anew(index):
    t = qv.quantize(randn(6, 16))
    wanted = t.dequantize()
    wanted[index] = 7.0
    version = t._version
    t[index] = 7.0
    assert_same(t.dequantize(), qv.quantize(wanted).dequantize())
    assert t.amax == wanted.abs().amax()
    assert t._version > version
    weight = nn.Parameter(t)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        weight[index] = 7.0


def test_multiplying_by_a_number_moves_the_scale_only():
    for op in (
        lambda a: a.mul_(0.3),
        lambda a: a.mul_(torch.tensor(0.3)),
        lambda a: a.mul_(torch.tensor(0.3, dtype=torch.float64)),
        lambda a: a.div_(3.0),
        lambda a: a.mul_(2),
        lambda a: a.div_(torch.tensor(7.0)),
    ):
        for granularity in ("tensor", "row", "block"):
            t = make(granularity=granularity)
            codes, plain, amax = bits(t.qdata).clone(), t.dequantize(), t.amax.clone()
            op(plain), op(amax)
            assert op(t) is t
            assert_same(bits(t.qdata), codes)
            torch.testing.assert_close(t.dequantize(), plain, rtol=2**-22, atol=0)
            assert_same(t.amax, amax.abs())


def test_views_share_the_codes():
    t = make()
    x = t.dequantize()
    views = ((t.t(), x.t()), (t.view(-1), x.view(-1)), (t.detach(), x), (t.transpose(0, 1), x.t()))
    for view, plain in views:
        assert isinstance(view, ScaledTensor)
        assert view.qdata.data_ptr() == t.qdata.data_ptr()
        assert_same(view.dequantize(), plain)
    rows = make(granularity="row")
    assert_same(rows.t() + 0, rows.dequantize().t() + 0)
    clone = t.clone()
    clone.fill_(0.0)
    assert t.dequantize().abs().max() > 0


def test_a_reshaped_view_that_needs_no_copy_shares():
    t = make()
    assert_same(t.reshape(3, 20) + 0, t.dequantize().reshape(3, 20))
    assert_same(t.flatten() + 0, t.dequantize().flatten())
    assert_same(t.contiguous() + 0, t.dequantize())


def test_another_dtype_keeps_the_codes():
    t = make(torch.float16)
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        other = t.to(dtype)
        assert other.dtype == dtype
        assert_same(other.qdata, t.qdata)
        assert_same(other.dequantize(), t.dequantize(dtype))
    assert t.to(torch.float32) is t
    assert t.to("cpu") is t
    moved = t.to("meta")
    assert moved.device.type == "meta" and moved.qdata.device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_copying_from_its_own_kind_copies_codes(kind):
    a, b = make(kind), make(kind, seed=1)
    assert_equal_tensors(a.copy_(b), b)
    c = make(E5M2 if kind == E4M3 else E4M3, seed=2)
    assert_same(a.copy_(c).dequantize(), qv.quantize(c.dequantize(), kind).dequantize())
    plain = torch.empty(6, 10)
    assert_same(plain.copy_(b), b.dequantize())
    a.copy_(ScaledTensor(b.qdata, b.scale))  # without an amax: it is worked out
    assert_same(a.amax, b.dequantize().abs().max())


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_copies_and_files(granularity):
    t = make(granularity=granularity, source=torch.bfloat16)
    file = io.BytesIO()
    torch.save({"t": t, "p": nn.Parameter(t)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert file.tell() >= 0
    for other in (
        copy.copy(t), copy.deepcopy(t), t.clone(), loaded["t"],
        loaded["p"],
    ):  # fmt: skip
        assert_equal_tensors(other, t)
    deep = copy.deepcopy(t)
    deep.zero_()
    assert t.dequantize().abs().max() > 0
    assert isinstance(loaded["p"], nn.Parameter)


def test_a_file_holds_codes_only():
    t = qv.quantize(randn(1000, 100))
    file = io.BytesIO()
    torch.save(t, file)
    assert t.numel() < len(file.getvalue()) < 1.1 * t.numel()


def test_a_file_of_a_weight_leaves_out_its_gemm_copies():
    net = qv.nn.Linear(64, 64)
    file = io.BytesIO()
    torch.save({"p": net.weight, "d": net.weight.data, "s": net.state_dict()}, file)
    assert len(file.getvalue()) < 1.2 * (2 + 2 + 4) * 64 * 64
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for t in (loaded["p"], loaded["d"]):
        assert_same(t.qdata, net.weight.qdata)
        assert not hasattr(t, "fp8_weight")
    assert type(loaded["s"]["weight"]) is torch.Tensor
    assert_same(loaded["s"]["weight"], net.weight.detach().dequantize())


def test_generic_code_over_parameters():
    p = nn.Parameter(make(torch.float16))
    q = nn.Parameter(randn(3))
    flat = nn.utils.parameters_to_vector([p, q])
    assert_same(flat.detach(), torch.cat([p.detach().dequantize().flatten(), q.detach()]))
    assert nn.utils.get_total_norm([p, q]).item() == pytest.approx(flat.norm().item())
    with torch.no_grad():
        for x, part in ((p, flat[:60].view(6, 10) * 0.5), (q, flat[60:])):
            x.copy_(part)
    assert_same(p.detach().dequantize(), make(torch.float16).dequantize() * 0.5)
    averaged = torch.optim.swa_utils.AveragedModel(nn.ParameterList([p, q]))
    averaged.update_parameters(nn.ParameterList([p, q]))
    assert_same(averaged.module[0].detach().dequantize(), p.detach().dequantize())


def test_autograd_through_a_parameter():
    p = nn.Parameter(make(torch.float16))
    x = randn(4, 10)
    (x @ p.t()).sum().backward()
    assert_same(p.grad, x.sum(0).expand(6, 10).contiguous())
    p.grad = None
    (p * p).sum().backward()
    assert_same(p.grad, 2 * p.detach().dequantize())


def test_gradients_of_any_kind_may_be_assigned_and_added():
    class Give(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p, grad):
            ctx.grad = grad
            return p.sum()

        @staticmethod
        def backward(ctx, dy):
            return ctx.grad, None

    for kind in (E4M3, E5M2):
        p = nn.Parameter(torch.zeros(6, 10))
        a, b = make(kind), make(kind, seed=1)
        plain = a.dequantize() + b.dequantize()
        Give.apply(p, a.clone()).backward()
        assert_equal_tensors(p.grad, a)
        grad = p.grad
        Give.apply(p, b).backward()
        assert p.grad is grad and grad.qdata.dtype == torch.bfloat16
        assert_same(p.grad.dequantize(), plain.bfloat16().float())
        (Give.apply(p, a) + Give.apply(p, b)).backward()  # both uses in one graph
        assert isinstance(p.grad, ScaledTensor)
        torch.testing.assert_close(p.grad.dequantize(), 2 * plain, rtol=2**-7, atol=0)
        p.grad.zero_()
        assert p.grad.dequantize().abs().max() == 0 and p.grad.amax == 0
        p.grad = None


def test_hooks_see_scaled_gradients():
    p = nn.Parameter(make(torch.float16))
    seen = []
    p.register_hook(lambda g: seen.append(type(g)))
    p.register_post_accumulate_grad_hook(lambda q: seen.append(q is p))
    p.sum().backward()
    assert seen == [torch.Tensor, True]


H = torch.ones(3, 4).half()
ROW, BLOCK = Layout("f16", "row"), Layout("f16", "block", 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ScaledTensor(torch.ones(3).int(), torch.ones(())), TypeError,
         "codes must be one of"),
        (lambda: ScaledTensor(torch.ones(3).half(), torch.ones((), dtype=torch.float64)), TypeError,
         "scale must be float32, got torch.float64"),
        (lambda: ScaledTensor(H, torch.ones(2)), ValueError, r"wanted scales \(\) .*\(2,\)"),
        (lambda: ScaledTensor(H, torch.ones(2, 1), None, torch.float32, ROW), ValueError,
         r"wanted scales \(3, 1\)"),
        (lambda: ScaledTensor(H, torch.ones(3, 3), None, torch.float32, BLOCK), ValueError,
         r"wanted scales \(3, 2\)"),
        (lambda: ScaledTensor(H, torch.ones(()), None, torch.float32, Layout("e4m3")), TypeError,
         "wanted torch.float8_e4m3fn for e4m3 with tensor scale, got torch.float16"),
        (lambda: Layout("f8"), ValueError, "format must be one of f32, .*, got 'f8'"),
        (lambda: Layout("e4m3", "column"), ValueError, "grain must be one of .*, got 'column'"),
        (lambda: Layout("e4m3", "block", 0), ValueError, "block must be a positive int, got 0"),
        (lambda: Layout("e4m3", expand=True), ValueError, 'expand goes with grain "flat"'),
        (lambda: ScaledTensor.rebuild({}, {"dtype": "int8"}), ValueError, "got 'int8'"),
    ],
)  # fmt: skip
def test_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_sum_of_two_fp8_tensors_is_bf16():
    """What autograd does with two uses of one weight; other sums are plain."""
    a, b = make(), make(seed=1)
    plain = a.dequantize() + b.dequantize()
    assert_same((a + b).dequantize(), plain.bfloat16().float())
    assert_same((a + b + a).dequantize(), (plain.bfloat16() + a.dequantize()).bfloat16().float())
    assert a.qdata.dtype == E4M3
    assert_same(a + b.dequantize(), plain)
    f16 = make(torch.float16)
    assert_same(f16 + f16, f16.dequantize() * 2)
