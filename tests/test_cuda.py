"""Every CUDA op gives the bits of the CPU op on the same inputs: the table is cuda_cases.py, which
is itself checked without a GPU. What else a GPU must do is in test_cuda_use.py.
"""

import cuda_cases
import pytest
import torch
from helpers import assert_same

from quaver import machine


def copy(value, device):
    """`value` with tensors of its own on `device`, strided and aligned as they were."""
    if isinstance(value, (list, tuple)):
        return [copy(v, device) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() and value.data_ptr() % 16:
        return cuda_cases.misaligned(value, device)
    return value.clone().to(device)


def tensors(items):
    for item in items:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from tensors(item)


def call(op, arguments, device):
    """The op's results and then its arguments, all tensors."""
    moved = copy(arguments, device)
    results = getattr(torch.ops.quaver, op)(*moved)
    return list(tensors([results, moved]))


def test_every_op_is_in_the_table():
    assert set(machine.backends()) == {*cuda_cases.CASES, *cuda_cases.ELSEWHERE}


@pytest.mark.parametrize("op", cuda_cases.CASES)
def test_the_table_is_of_calls_that_the_cpu_takes(op):
    names = set()
    for name, arguments in cuda_cases.CASES[op]():
        found = call(op, arguments, "cpu")
        assert found, name
        assert name not in names
        names.add(name)


@pytest.mark.cuda
@pytest.mark.parametrize("op", cuda_cases.CASES)
def test_bits(op):
    for name, arguments in cuda_cases.CASES[op]():
        wanted = call(op, arguments, "cpu")
        for i, (got, want) in enumerate(zip(call(op, arguments, "cuda"), wanted, strict=True)):
            assert got.is_cuda or not got.numel(), name
            assert_same(got.cpu(), want, f"{op}, {name}, tensor {i}", any_nan=True)
