"""Rotary positions: the op, and attention's use of it."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, everywhere, randn
from torch.nn.attention import SDPBackend, sdpa_kernel

import quaver as qv
from quaver import models, reference
from quaver.models.layers import Attention, rotary, turn

BF16 = torch.bfloat16


def parts_of(heads, dim, dtype=BF16, batch=2, length=5):
    return [randn(batch, length, n, dim, seed=n).to(dtype) for n in heads]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("dim", [2, 10, 64, 128, 1200])
@pytest.mark.parametrize("heads, turned", [((5,), 3), ((4, 2, 2), 6), ((3, 1), 0), ((0, 2), 2)])
def test_the_bits_are_the_references(heads, turned, dim, dtype):
    parts, (cos, sin) = parts_of(heads, dim, dtype), rotary(dim, 5, 10000.0)
    for inverse in (False, True):
        got = qv.ops.rotate(parts, cos, sin, turned, inverse)
        assert_same(got, reference.rotate(parts, cos, sin, turned, inverse))
        strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts]
        assert_same(qv.ops.rotate(strided, cos, sin, turned, inverse), got)
        columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in parts]
        assert_same(qv.ops.rotate(columns, cos, sin, turned, inverse), got)


def test_every_instruction_set_gives_the_same_bits():
    parts, (cos, sin) = parts_of((9, 3), 80, length=33), rotary(80, 33, 10000.0)
    everywhere(
        lambda: [qv.ops.rotate(parts, cos, sin, 9), qv.ops.rotate(parts, cos, sin, 12, True)]
    )


def test_turning_back_undoes_it():
    x, (cos, sin) = randn(1, 7, 2, 32, seed=1), rotary(32, 7, 10000.0)
    back = qv.ops.rotate([qv.ops.rotate([x], cos, sin, 2)], cos, sin, 2, inverse=True)
    torch.testing.assert_close(back, x)


def test_half_precision_keeps_infinities():
    parts, (cos, sin) = parts_of((3,), 8, torch.float16), rotary(8, 5, 10000.0)
    parts[0][0, 0, 0, 0] = torch.inf  # of a scaled loss that overflows
    assert turn(parts, cos, sin, 2, inverse=True)[0, 0, 0, 0] == torch.inf
    assert_same(turn(parts, cos, sin, 3), reference.rotate(parts, cos, sin, 3))


def test_positions_that_were_cast_are_taken():
    """FSDP2 with mixed precision casts them, as inputs of a block."""
    parts, (cos, sin) = parts_of((3,), 8), (t.bfloat16() for t in rotary(8, 5, 10000.0))
    assert_same(turn(parts, cos, sin, 2), reference.rotate(parts, cos.float(), sin.float(), 2))


@pytest.mark.parametrize(
    "change, error",
    [
        ({"turned": 4}, r"rotate: turned must be in \[0, 3\], got 4"),
        ({"parts": []}, "rotate: parts must be 1 to 3 tensors, got 0"),
        ({"parts": [torch.zeros(2, 5, 3, 7)]}, "rotate: a head must have an even number"),
        ({"parts": [torch.zeros(2, 5, 3)]}, "rotate: parts must be .* got 3 axes"),
        ({"parts": [torch.zeros(2, 5, 3, 8, dtype=torch.float16)]}, "must be f32 or bf16, got f16"),
        ({"cos": torch.zeros(4, 8)}, r"rotate: cos must be float32 \[5, 8\], got Float \["),
        ({"sin": torch.zeros(5, 8, dtype=BF16)}, "rotate: sin must be float32"),
    ],
)
def test_wrong_arguments_are_named(change, error):
    cos, sin = rotary(8, 5, 10000.0)
    given = {"parts": parts_of((3,), 8), "cos": cos, "sin": sin, "turned": 2} | change
    if given["parts"] and given["parts"][0].shape[-1] == 7:
        given |= {"cos": torch.zeros(5, 7), "sin": torch.zeros(5, 7)}
    with pytest.raises((RuntimeError, ValueError), match=error):
        qv.ops.rotate(**given)


def test_parts_must_be_alike():
    cos, sin = rotary(8, 5, 10000.0)
    for other in (torch.zeros(2, 5, 1, 8), torch.zeros(2, 4, 1, 8, dtype=BF16)):
        with pytest.raises((RuntimeError, ValueError), match=r"alike .*, got .* beside "):
            qv.ops.rotate([*parts_of((3,), 8), other], cos, sin, 2)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_attention_has_the_second_derivative_of_its_steps(dtype):
    torch.manual_seed(0)
    attention = Attention(models.Config(dim=32, heads=4, kv_heads=2), bias=False).to(dtype)
    position, x = rotary(8, 16, 10000.0), randn(2, 16, 32).to(dtype).requires_grad_()

    def steps(x):
        parts = [t.unflatten(-1, (-1, 8)) for t in attention.qkv(x).split(attention.split, dim=-1)]
        joint = reference.rotate(parts, *position, 6)
        q, k, v = (t.transpose(1, 2) for t in joint.split([4, 2, 2], dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attention.out(y.transpose(1, 2).flatten(2))

    def penalty(function):
        with sdpa_kernel(SDPBackend.MATH):  # torch's others have no second derivative
            (grad,) = torch.autograd.grad(function(x).float().square().sum(), x, create_graph=True)
            return torch.autograd.grad(grad.float().square().sum(), [x, attention.qkv.weight])

    ulp = torch.finfo(dtype).eps  # some tens of roundings in a row
    for got, wanted in zip(penalty(lambda x: attention(x, position)), penalty(steps), strict=True):
        assert (got - wanted).float().norm() <= 32 * ulp * wanted.float().norm()
