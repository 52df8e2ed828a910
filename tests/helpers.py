"""Helpers of all tests."""

import contextlib

import torch

from quaver import _C, ScaledTensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The types of an op's refusal; the stable ABI of some torch versions keeps the C++ type.
REFUSAL = (RuntimeError, ValueError)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t):
    return t.detach().contiguous().view(_BITS[t.element_size()])


def assert_same(got, wanted, what="", any_nan=False):
    """Bit for bit, dtype and shape included; NaNs of wider formats count as one, or of all of them
    with `any_nan`: machines differ in the signs and payloads that their conversions give."""
    assert got.dtype == wanted.dtype, what
    assert got.shape == wanted.shape, what
    same = bits(got) == bits(wanted)
    if got.dtype in (torch.float32, torch.float64, torch.bfloat16):
        same |= got.isnan() & wanted.isnan()
    elif any_nan and got.is_floating_point():
        same |= got.float().isnan() & wanted.float().isnan()
    bad = (~same).nonzero()
    first = tuple(bad[0].tolist()) if len(bad) else None
    assert first is None, (
        f"{what}: {len(bad)} of {same.numel()} differ, the first at {first}: "
        f"got {got[first].item()}, wanted {wanted[first].item()}"
    )


def random_bits(n, seed=0):
    """Floats of every exponent, subnormals, infinities and NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64, generator=generator)
        .to(torch.int32)
        .view(torch.float32)
    )


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts_of(t):
    """Clones of the codes, scale and amax of a tensor; 1 and 0 for what it has not."""
    if not isinstance(t, ScaledTensor):
        return t.detach().clone(), torch.ones(()), torch.zeros(())
    parts = {"amax": torch.zeros(()), **t.parts()}
    return tuple(parts[name].detach().clone() for name in ("qdata", "scale", "amax"))


@contextlib.contextmanager
def isa(name):
    before = _C.cpu_isa()
    _C.set_cpu_isa(name)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def everywhere(function):
    """`function()`, a list of tensors, after checking that every instruction set and every number
    of threads gives the same bits."""
    wanted = None
    for name in _C.available_isas():
        for count in (1, 2, 3):
            with isa(name), threads(count):
                got = function()
            wanted = got if wanted is None else wanted
            for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
                assert_same(a, b, f"{name}, {count} threads, output {i}")
    return wanted
