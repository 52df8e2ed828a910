"""A write to a ScaledTensor, or to a part of one, takes effect or is refused by name; nothing else
changes."""

import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import FP8, assert_same, bits, randn
from torch import nn

import quaver as qv
from quaver import ScaledTensor
from quaver.read_only import ReadOnlyTensor

E4M3, F16 = FP8[0], torch.float16
SHAPE = (6, 8)

# Relative to the value: half a unit in the last place, or a whole one where f16 rounds
# stochastically.
ROUNDING = {E4M3: 2.0**-4, F16: 2.0**-10}


def x(t):
    return torch.linspace(-1, 1, t.numel()).view(t.shape)


def fused(t, optimizer, **options):
    p = t if isinstance(t, nn.Parameter) else t.detach()
    p = nn.Parameter(p)  # the same memory
    p.grad = x(t) + 2
    optimizer([p], lr=0.01, **options).step()


def assign(t):
    t.data = x(t)


def assign_scaled(t):
    t.data = qv.quantize(x(t), F16) if isinstance(t, ScaledTensor) else qv.quantize(
        x(t), F16).dequantize()  # fmt: skip


def set_item(t, index, value=0.5):
    t[index] = value


def vector(t):
    nn.utils.vector_to_parameters(torch.linspace(-1, 1, t.numel()), [t])


WRITES = {
    "add_ a tensor": lambda t: t.add_(x(t)),
    "add_ a number": lambda t: t.add_(0.25),
    "add_ alpha": lambda t: t.add_(x(t), alpha=0.5),
    "sub_": lambda t: t.sub_(x(t)),
    "mul_ a tensor": lambda t: t.mul_(x(t)),
    "mul_ a number": lambda t: t.mul_(0.3),
    "mul_ a negative number": lambda t: t.mul_(-0.5),
    "mul_ zero": lambda t: t.mul_(0.0),
    "div_": lambda t: t.div_(3.0),
    "neg_": lambda t: t.neg_(),
    "abs_": lambda t: t.abs_(),
    "relu_": lambda t: t.relu_(),
    "tanh_": lambda t: t.tanh_(),
    "clamp_": lambda t: t.clamp_(-0.3, 0.3),
    "fill_": lambda t: t.fill_(0.7),
    "zero_": lambda t: t.zero_(),
    "copy_": lambda t: t.copy_(x(t)),
    "copy_ bf16": lambda t: t.copy_(x(t).bfloat16()),
    "lerp_": lambda t: t.lerp_(x(t), 0.1),
    "addcmul_": lambda t: t.addcmul_(x(t), x(t), value=0.1),
    "addcdiv_": lambda t: t.addcdiv_(x(t), x(t).abs() + 1, value=0.1),
    "masked_fill_": lambda t: t.masked_fill_(x(t) > 0, 0.7),
    "constant_": lambda t: nn.init.constant_(t, 0.25),
    "out=": lambda t: torch.add(x(t), 0.5, out=t),
    "mul out=": lambda t: torch.mul(t, 0.5, out=t),
    "t += x": lambda t: t.__iadd__(x(t)),
    "t[0] =": lambda t: set_item(t, 0),
    "t[..., 1] =": lambda t: set_item(t, (..., 1)),
    "t[mask] =": lambda t: set_item(t, x(t) > 0),
    "t[index] =": lambda t: set_item(t, torch.tensor([0, -1])),
    "index_fill_": lambda t: t.index_fill_(0, torch.tensor([0]), 0.7),
    "_foreach_add_": lambda t: torch._foreach_add_([t], 0.25),
    "_foreach_add_ twice": lambda t: torch._foreach_add_([t, t], 0.25),
    "_foreach_mul_": lambda t: torch._foreach_mul_([t], 0.3),
    "_foreach_lerp_": lambda t: torch._foreach_lerp_([t], [x(t)], 0.1),
    "_foreach_copy_": lambda t: torch._foreach_copy_([t], [x(t)]),
    "_foreach_zero_": lambda t: torch._foreach_zero_([t]),
    "fused SGD": partial(fused, optimizer=torch.optim.SGD, fused=True),
    "fused AdamW": partial(fused, optimizer=torch.optim.AdamW, fused=True),
    "foreach AdamW": partial(fused, optimizer=torch.optim.AdamW, foreach=True),
    "AdamW": partial(fused, optimizer=torch.optim.AdamW),
    ".data =": assign,
    ".data = a ScaledTensor": assign_scaled,
    ".data.add_": lambda t: t.data.add_(0.25),
    "detach().mul_": lambda t: t.detach().mul_(0.5),
    "view.fill_": lambda t: t[:1].fill_(0.5),
    "vector_to_parameters": vector,
    "set_": lambda t: t.set_(x(t)),
    "resize_": lambda t: t.detach().resize_(2, 2),
    "unsqueeze_": lambda t: t.unsqueeze_(0),
    "apply_": lambda t: t.apply_(lambda value: value + 0.25),
    "map_": lambda t: t.map_(x(t), lambda a, b: a + b),
}

# Which part of a tensor is written. The last two cannot share the codes of rows or blocks.
PARTS = {
    "whole": lambda t: t,
    "rows": lambda t: t[1:3],
    "one row": lambda t: t[3],
    "columns": lambda t: t[:, 2:5],
    "transposed": lambda t: t.t(),
    "view": lambda t: t.view(4, 12),
    "diagonal": lambda t: t.diagonal(),
    "row of transposed": lambda t: t.t()[0],
    "unbind": lambda t: t.unbind(1)[2],
    "chunk": lambda t: t.chunk(2, dim=1)[1],
    "unsqueeze": lambda t: t.unsqueeze(0),
    "permute": lambda t: t.permute(1, 0),
    "split of rows of view": lambda t: t.view(2, 3, 8)[1].split(2)[0],
}

KINDS = {
    "weight": lambda: nn.Parameter(qv.quantize(randn(*SHAPE), F16)),
    "gradient": lambda: qv.quantize(randn(*SHAPE), E4M3),
}

NAMED = re.compile(r"^\S+.*: .+", re.S)  # the op, or ScaledTensor, and what is wrong


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_a_write_takes_effect_or_is_refused_by_name(name, kind, part):
    write, take = WRITES[name], PARTS[part]
    torch.manual_seed(0)
    t = KINDS[kind]()
    before = t.detach().dequantize()
    codes, version = bits(t.qdata).clone(), t._version
    wanted = before.clone()
    mine = torch.zeros(SHAPE, dtype=torch.bool)
    take(mine).fill_(True)
    try:
        write(take(t))
    except (RuntimeError, ValueError) as error:
        assert NAMED.match(str(error)) and not isinstance(error, AssertionError), error
        assert_same(bits(t.qdata), codes)
        assert_same(t.detach().dequantize(), before)
        assert name in MAY_BE_REFUSED or part != "whole", f"{name} was refused: {error}"
        return
    if name in OTHER_MEMORY and part != "whole":  # as of torch's views, which then leave the whole
        assert_same(bits(t.qdata), codes)
        return
    plain = take(wanted).contiguous().clone()  # torch's fused optimizers misread other strides
    write(plain)
    take(wanted).copy_(plain)
    got = t.detach().dequantize()
    assert_same(got[~mine], before[~mine], "what was not written")
    # A step below a tensor's scale is as coarse as the largest value's subnormals: 2^-9 of e4m3's.
    coarse = t.scale * (2.0**-10 if t.qdata.dtype == E4M3 else 2.0**-24)
    steps = 2 if name in TWO_ROUNDINGS else 1
    bound = wanted.abs() * ROUNDING[E4M3 if kind == "gradient" else F16] * steps + coarse * steps
    assert ((got - wanted).abs() <= bound)[mine].all(), (got - wanted)[mine].abs().max()
    assert t.amax >= got.abs().max() * (1 - 2.0**-4)
    assert t._version > version


OTHER_MEMORY = (".data =", ".data = a ScaledTensor", "vector_to_parameters")
MAY_BE_REFUSED = ("set_", "resize_", "unsqueeze_", "apply_", "map_")
TWO_ROUNDINGS = (
    "_foreach_add_ twice", "AdamW", "foreach AdamW", "fused AdamW", ".data = a ScaledTensor",
)  # fmt: skip


# Collectives


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def coalesced(t):
    with dist._coalescing_manager():
        dist.all_reduce(t)


COLLECTIVES = {
    "all_reduce": lambda t: dist.all_reduce(t),
    "all_reduce, asynchronous": lambda t: dist.all_reduce(t, async_op=True).wait(),
    "broadcast": lambda t: dist.broadcast(t, 0),
    "broadcast of .data": lambda t: dist.broadcast(t.data, 0),
    "broadcast of a row": lambda t: dist.broadcast(t[0], 0),
    "reduce": lambda t: dist.reduce(t, 0),
    "all_gather_into_tensor": lambda t: dist.all_gather_into_tensor(t, torch.ones(SHAPE)),
    "reduce_scatter": lambda t: dist.reduce_scatter(t, [torch.ones(SHAPE)]),
    "reduce_scatter_tensor": lambda t: dist.reduce_scatter_tensor(t, torch.ones(SHAPE)),
    "scatter": lambda t: dist.scatter(t, [torch.ones(SHAPE)], 0),
    "all_to_all": lambda t: dist.all_to_all([t], [torch.ones(SHAPE)]),
    "all_to_all_single": lambda t: dist.all_to_all_single(t, torch.ones(SHAPE)),
    "recv": lambda t: dist.recv(t, 0, tag=1),
    "functional all_reduce_": lambda t: torch.ops._c10d_functional.all_reduce_(t, "sum", "0"),
}


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("kind", [*KINDS, "decoded"])
def test_a_collective_that_writes_is_refused_by_name(one_rank, name, kind):
    read_only = kind == "decoded"
    t = ReadOnlyTensor(randn(*SHAPE)) if read_only else KINDS[kind]().detach()
    before = t.values.clone() if read_only else t.dequantize()
    message = "decoded values of a Scaled" if read_only else "a collective cannot write"
    with pytest.raises((RuntimeError, ValueError), match=f"{message}|Invalid source rank"):
        COLLECTIVES[name](t)
    assert_same(t.values if read_only else t.dequantize(), before)


@pytest.mark.parametrize(
    "collect",
    [
        lambda t: dist.all_gather([t], torch.ones(SHAPE)),
        lambda t: dist.gather(torch.ones(SHAPE), [t], 0),
    ],
)
def test_collectives_into_lists_of_lists_take_effect(one_rank, collect):
    """torch passes these to no tensor subclass; gloo then writes by copy_, whose error it drops."""
    for kind in KINDS:
        t = KINDS[kind]().detach()
        collect(t)
        assert_same(t.dequantize(), torch.ones(SHAPE))
    t = ReadOnlyTensor(randn(*SHAPE))
    before = t.values.clone()
    with pytest.raises(SystemError):
        collect(t)
    assert_same(t.values, before)


def test_collectives_read_decoded_values(one_rank):
    for t in (KINDS["gradient"](), KINDS["weight"]().detach()):
        out = torch.zeros(SHAPE)
        dist.all_gather([out], t)
        assert_same(out, t.dequantize())
        dist.all_gather_into_tensor(out.zero_(), t)
        assert_same(out, t.dequantize())
        found = [None]
        dist.all_gather_object(found, {"t": t})  # as an optimizer's state_dict is gathered
        assert_same(found[0]["t"].qdata, t.qdata)
        assert_same(torch.distributed._functional_collectives.all_reduce(t, "sum", "0") + 0,
                    t.dequantize())  # fmt: skip


def test_foreach_over_mixed_lists_and_repeated_tensors():
    t, u = KINDS["gradient"](), torch.zeros(SHAPE)
    before = t.dequantize()
    torch._foreach_add_([t, u, t], [torch.ones(SHAPE)] * 3)
    assert_same(u, torch.ones(SHAPE))
    assert_same(t.dequantize(), qv.quantize(before + 2).dequantize())


def test_an_op_over_several_tensors_writes_all_or_none():
    whole, other = (qv.quantize(torch.ones(4, 4)) for _ in range(2))
    with pytest.raises(ValueError, match=r"101\.0 does not fit into a part"):
        torch._foreach_add_([other, whole[1:3]], 100.0)
    for t in (whole, other):
        assert_same(t.dequantize(), torch.ones(4, 4))
