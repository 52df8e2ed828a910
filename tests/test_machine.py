"""Choices that depend on this machine's CPU."""

import contextlib

import pytest
import torch

import quaver as qv
from quaver import machine
from quaver.errors import UsageError

CPU = torch.device("cpu")


def low(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("product", [torch.mm, torch.bmm, torch.addmm])
def test_bf16_products_in_f32_round_once(product):
    lead = (3,) if product is torch.bmm else ()
    a, b = low(*lead, 33, 500, seed=0), low(*lead, 500, 17, seed=1)
    addend = (low(17, seed=2),) if product is torch.addmm else ()
    with machine.F32Products():
        out = product(*addend, a, b)
    assert out.dtype == torch.bfloat16
    exact = product(*(x.double() for x in (*addend, a, b)))
    # One rounding to 8 bits, and f32 sums of 500 products of about 1.
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=500 * 2**-23)


def test_gradients_of_bf16_products_are_taken_in_f32_too():
    a, b = (low(64, 64, seed=i).requires_grad_() for i in range(2))
    with machine.F32Products():
        (a @ b).sum().backward()
    exact = b.detach().double().sum(1).expand(64, 64)
    torch.testing.assert_close(a.grad.double(), exact, rtol=2**-8, atol=64 * 2**-23)


def test_other_products_are_left_alone():
    a = torch.ones(2, 2)
    with machine.F32Products():
        assert (a @ a).dtype == torch.float32
        assert (a.half() @ a.half()).dtype == torch.float16
        assert (a.bfloat16() + a).dtype == torch.float32


@pytest.mark.parametrize("isa, wide", [("AVX2", False), ("AVX512", True), ("DEFAULT", False)])
def test_f32_is_taken_only_where_bf16_is_slow(monkeypatch, isa, wide):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: isa)
    assert isinstance(machine.bf16_products(CPU), machine.F32Products) is not wide
    assert not isinstance(machine.bf16_products(torch.device("cuda")), machine.F32Products)


@pytest.mark.parametrize(
    ("served", "why"),
    [
        (
            12080,
            "the driver serves CUDA up to 12.8, and this build has the runtime of CUDA 13.0.88",
        ),
        (13000, None),
        (13010, None),
    ],
)
def test_a_driver_older_than_the_runtime_is_named(monkeypatch, served, why):
    """A torch of CUDA 12.6 runs there, and none of our kernels would."""
    build = qv.build_info() | {"cuda": True, "cuda_runtime": "13.0.88", "cuda_archs": ["90a"]}
    monkeypatch.setattr(qv, "build_info", lambda: build)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: served, raising=False)
    found = machine.why_not_cuda()
    assert found is None if why is None else found.startswith(why)
    with pytest.raises(UsageError) if why else contextlib.nullcontext():
        assert machine.choose_device("cuda").type == "cuda"


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), ["90a"], True),
        ((8, 9), ["90a"], False),
        ((8, 9), ["80", "90a"], True),
        ((8, 0), ["89", "90a"], False),
        ((10, 0), ["90a", "100"], True),
        ((10, 3), ["100"], True),
        ((12, 0), ["100"], False),
        ((12, 0), ["89", "120"], True),
    ],
)
def test_a_gpu_is_refused_only_where_this_build_has_no_code_for_it(
    monkeypatch, capability, archs, runs
):
    build = qv.build_info() | {"cuda": True, "cuda_runtime": "13.0.88", "cuda_archs": archs}
    monkeypatch.setattr(qv, "build_info", lambda: build)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    found = machine.why_not_cuda()
    if runs:
        assert found is None
    else:
        major, minor = capability
        assert f"compute capability {major}.{minor}" in found
        assert f"QUAVER_CUDA_ARCHS={major}{minor}" in found
