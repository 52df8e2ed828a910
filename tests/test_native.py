"""No argument of a native op may read or write outside, hide a value or lose an error's reason."""

import contextlib
import itertools
import resource
import subprocess
import sys

import pytest
import torch
from helpers import FP8, REFUSAL, assert_same, everywhere, randn

import quaver as qv
from quaver import reference

E4M3, E5M2 = FP8
INF, NAN = float("inf"), float("nan")
ONE = torch.ones(())
HUGE = (2**30 + 1, 2**62, 2**63 - 1)
ops = torch.ops.quaver


@pytest.mark.parametrize("block", HUGE)
def test_a_block_that_overflows_is_refused(block):
    x, q = randn(4, 48), torch.zeros(4, 48).to(E4M3)
    bytes_ = torch.zeros(4, 1, dtype=torch.uint8)
    for call in (
        lambda: ops.quantize(x, E4M3, granularity="block", block=block),
        lambda: ops.dequantize(q, torch.ones(4, 1), torch.float32, "block", block),
        lambda: ops.normalize(x, None, None, 1e-6, False, E4M3, block=block),
        lambda: ops.normalize_backward(
            x, q, bytes_, torch.empty(0), torch.ones(4), None, block, False, torch.float32
        ),
        lambda: ops.activate(x, None, "silu", None, E4M3, block=block),
        lambda: ops.activate_backward(x, q, bytes_, None, None, "silu", None, block, E5M2),
    ):
        with pytest.raises(REFUSAL, match=f"block must be at most {2**30}, got {block}"):
            call()


@pytest.mark.parametrize("sizes", [[2**63 - 1], [2**62, 2**62], [16, 2**63 - 17], [-1], [2**57]])
def test_sizes_that_overflow_are_refused(sizes):
    with pytest.raises(REFUSAL, match="reduce_shards: sizes must"):
        ops.reduce_shards(randn(2, 32), None, None, sizes, 0, torch.float32)
    with pytest.raises(REFUSAL, match="reduce_shards: first must be at most"):
        ops.reduce_shards(randn(2, 32), None, None, [32], 2**63 - 16, torch.float32)


SCALES = (-1.0, -1.2e36, -1.4e36, -3e38, 1.4e36, 3e38, 1e-45, -1e-45, -0.0, INF, -INF, NAN)


@pytest.mark.parametrize("dtype", [*FP8, torch.float16])
def test_any_scale_decodes_alike_everywhere(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    q = codes.view(dtype) if dtype in FP8 else torch.arange(-(2**15), 2**15, 7).short().view(dtype)
    for scale in map(torch.tensor, SCALES):
        got = everywhere(lambda scale=scale: [ops.dequantize(q, scale, torch.float32)])
        assert_same(got[0], q.float() * scale, f"scale {scale}")


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("scales", [(0.0, 1.0), (1e-30, 1e-30), (-0.0, 2.0)])
def test_scales_that_multiply_to_zero_hide_nothing(bad, scales):
    a, b = randn(16, 32), randn(48, 32)
    a[3, 5] = bad
    a, b = a.to(E5M2), b.to(E4M3)  # e5m2 holds infinity
    a_scale, b_scale = map(torch.tensor, scales)
    for out_dtype in (torch.float32, torch.bfloat16):
        y = ops.gemm(a, a_scale, b, b_scale, None, out_dtype)
        assert y[3].isnan().all()
        assert (y[:3] == 0).all() and (y[4:] == 0).all()


@pytest.mark.parametrize(("m", "n", "k"), [(0, 16, 32), (16, 0, 32), (0, 0, 16), (16, 32, 0)])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_empty_products(m, n, k, rows, out_dtype):
    granularity = "row" if rows else "tensor"
    a, b = (qv.quantize(randn(size, k), granularity=granularity) for size in (m, n))
    assert_same(qv.gemm(a, b, out_dtype), torch.zeros(m, n, dtype=out_dtype))
    bias = randn(n)
    wanted = bias.to(out_dtype).expand(m, n).contiguous()
    assert_same(qv.gemm(a, b, out_dtype, bias=bias), wanted)
    out = randn(m, n, dtype=out_dtype)
    assert_same(qv.gemm(a, b, out=out.clone(), accumulate=True), out)


# Older torch tells an extension that a call failed, not why.
REASONS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
with_reasons = pytest.mark.skipif(not REASONS, reason="torch hands on its errors from 2.13 on")


@with_reasons
def test_an_error_of_torch_keeps_its_reason():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        ops.pack([ONE], [torch.empty(0)], None, torch.float32, 2**56)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        a = qv.quantize(randn(16, 32))
        ops.gemm_(torch.zeros(1).expand(16, 16), a.qdata, a.scale, a.qdata, a.scale)


OUT_OF_MEMORY = """
import torch, quaver
def no_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
library = torch.library.Library("aten", "IMPL")
library.impl("clone", no_memory, "CPU")
try:
    quaver.quantize(torch.ones(4, 3).t())
except torch.OutOfMemoryError as error:
    print("caught", error)
"""


@with_reasons
def test_out_of_memory_is_torch_s_own_error():
    """Of a GPU; a stand-in for its allocator raises it here."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OUT_OF_MEMORY], capture_output=True, text=True
    )
    assert "caught" in result.stdout and "Tried to allocate 2.00 GiB" in result.stdout, result


def misaligned(x):
    """x in memory that begins one byte beside a multiple of its elements' size."""
    x = x.contiguous()
    memory = bytearray(x.numel() * x.element_size() + 1)
    moved = torch.frombuffer(memory, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
    return moved.copy_(x)


def test_arguments_at_odd_addresses():
    x, other = randn(20, 48), randn(20, 48)
    got, wanted = ops.quantize(misaligned(x), E4M3), ops.quantize(x, E4M3)
    for a, b in zip(got, wanted, strict=True):
        assert_same(a, b)
    q, scale, amax = wanted
    with pytest.raises(REFUSAL, match="scale must start at a multiple of 4 bytes"):
        ops.accumulate_(q, misaligned(scale), amax, other)
    with pytest.raises(REFUSAL, match="history must start at a multiple of 4 bytes"):
        ops.quantize(x, E4M3, history=misaligned(torch.zeros(17)))
    hyper = torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.1]], dtype=torch.float64)
    for name, change in (("step", 0), ("hyper", 1), ("skipped", 2)):
        given = [torch.zeros((), dtype=torch.int64), hyper, torch.zeros((), dtype=torch.int64)]
        given[change] = misaligned(given[change])
        step, *rest = given
        states, none = [randn(8), torch.zeros(8), torch.zeros(8)], torch.empty(0)
        with pytest.raises(REFUSAL, match=f"adam_: {name} must start at a multiple of 8 bytes"):
            ops.adam_(states, [none] * 3, [none] * 3, [randn(8)], [none], torch.ones(1), [step],
                      *rest, [], [], [])  # fmt: skip


def strided(x):
    """x with other values between its own."""
    wide = torch.full((*x.shape, 2), NAN, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


@pytest.mark.parametrize("layout", [strided, lambda x: x[:1].expand(x.shape)])
def test_list_like_arguments_are_read_by_their_strides_or_refused(layout):
    x, y = randn(17, 48), torch.ones(17, 1)
    ones = torch.ones(48)
    xq, xscale = ops.normalize(x, None, None, 1e-6, True, E4M3)[4:6]
    dy = randn(17, 48)
    codes = x.to(E4M3)
    calls = [
        lambda s: ops.quantize(x, E4M3, s(y), None, "row"),
        lambda s: ops.quantize(x, E4M3, None, s(torch.zeros(17))),
        lambda s: ops.dequantize(codes, s(y), torch.float32, "row"),
        lambda s: ops.normalize(x, s(ones), s(ones), 1e-6, True, E4M3),
        lambda s: ops.normalize_backward(
            dy, xq, xscale, s(torch.zeros(17)), s(torch.ones(17)), s(ones), 32, True, torch.float32
        ),
        lambda s: ops.activate(x, None, "silu", s(ones), E4M3),
        lambda s: ops.activate_backward(dy, xq, xscale, None, None, "silu", s(ones), 32, E5M2),
        lambda s: ops.gemm(codes, s(y), codes, s(y), s(torch.ones(17)), torch.float32),
        lambda s: ops.share_scales(s(torch.ones(4, 17)), s(torch.ones(17)), E4M3),
        lambda s: ops.pack([ONE] * 17, [torch.empty(0)] * 17, s(torch.ones(17)), E4M3, 272),
        lambda s: ops.reduce_shards(randn(2, 272), s(torch.ones(17)), s(torch.ones(17)), [16] * 17,
                                    0, torch.float32),
        lambda s: ops.decode_state(torch.zeros(17 * 128).to(E4M3), s(torch.ones(17)), True),
    ]  # fmt: skip
    for i, call in enumerate(calls):
        wanted = call(lambda t: t.clone())
        try:
            got = call(layout)
        except REFUSAL as error:
            assert "contiguous" in str(error), i
            continue
        wanted, got = (t if isinstance(t, tuple) else (t,) for t in (wanted, got))
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b, f"call {i}")


def test_a_tensor_on_meta_beside_others_is_refused():
    x, meta = randn(16, 32), torch.zeros(17, device="meta")
    calls = [
        ("history", lambda: ops.quantize(x, E4M3, history=meta)),
        ("history", lambda: ops.cast_transpose(x, E4M3, history=meta)),
        ("b", lambda: ops.gemm(x.to(E4M3), ONE, x.to(E4M3).to("meta"), ONE, None, torch.float32)),
        ("grads", lambda: ops.grad_norm([x, meta], [torch.empty(0)] * 2, [torch.empty(0)] * 2)),
        ("scale", lambda: ops.dequantize(x.to(E4M3), ONE.to("meta"), torch.float32)),
    ]
    for name, call in calls:
        with pytest.raises(REFUSAL, match=f"{name} must be on cpu like the rest, got meta"):
            call()
    assert ops.quantize(x.to("meta"), E4M3)[0].is_meta


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_no_call_leaks():
    """A string argument used to cost 44 to 80 bytes a call, for ever."""
    x = randn(16, 16)
    q, scale, _ = ops.quantize(x, E4M3, None, None, "row")
    n = ops.activate(x, None, "gelu", None, E4M3)

    def refused():
        with contextlib.suppress(*REFUSAL):
            ops.quantize(x, E4M3, None, None, "column")

    calls = [
        refused,
        lambda: ops.quantize(x, E4M3, None, None, "row"),
        lambda: ops.dequantize(q, scale, torch.float32, "row"),
        lambda: ops.activate(x, None, "gelu_tanh", None, E4M3),
        lambda: ops.activate_backward(x, n[4], n[5], None, None, "gelu", None, 32, E5M2),
    ]
    growth = []
    for count in (2000, 20000, 20000):
        before = resident()
        for call in itertools.chain.from_iterable(itertools.repeat(calls, count)):
            call()
        growth.append(resident() - before)
    assert min(growth[1:]) < 20000 * len(calls) * 4  # less than 4 bytes a call; the leak was 44


def test_the_oracle_of_a_decoded_state_knows_any_scale():
    q = torch.arange(256, dtype=torch.uint8).view(E4M3)
    for expand in (False, True):
        for scale in (1e-45, -2.0, 3e38, -3e38):
            scales = torch.full((2,), scale)
            got = everywhere(lambda s=scales, e=expand: [ops.decode_state(q, s, e)])
            assert_same(got[0], reference.decode_state(q, scales, expand), f"{scale} {expand}")
