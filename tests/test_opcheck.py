"""Every op keeps torch's rules: schema, aliasing, fake kernels, compilation."""

import copy
import math

import pytest
import torch
from helpers import FP8, assert_same, randn
from torch.library import opcheck

import quaver as qv

E4M3, E5M2 = FP8
ops = torch.ops.quaver
ONE = torch.ones(())


def history():
    state = torch.zeros(17)
    state[:4] = torch.tensor([3.0, 1.0, 2.0, 1.5])
    return state


def adam(n=2):
    shape, none = (16, 32), torch.empty(0)

    def each(make):
        return [make() for _ in range(n)]

    return (
        each(lambda: randn(*shape).half()) + each(lambda: torch.zeros(shape).to(E4M3))
        + each(lambda: torch.zeros(shape).half()),
        [ONE.clone() for _ in range(3 * n)], [ONE.clone() for _ in range(3 * n)],
        each(lambda: randn(*shape)), each(lambda: none), torch.ones(n),
        each(lambda: torch.zeros((), dtype=torch.int64)),
        torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.1]] * n, dtype=torch.float64),
        torch.zeros((), dtype=torch.int64),
        each(lambda: torch.zeros(shape).to(E4M3))
        + each(lambda: torch.zeros(shape[::-1]).to(E4M3)) + each(ONE.clone),
        [], [], [], [3, -1], [5, 0], [0, 0],
    )  # fmt: skip


def adam_in_groups(n=2):
    """bf16 weights with a remainder and one stochastic, moments in groups and expanded."""
    shape, none = (10, 20), torch.empty(0)
    nones = [none] * n
    states = [ops.encode_state(randn(*shape, seed=i).abs(), E4M3, i % 2 == 1) for i in range(2 * n)]
    return (
        [randn(*shape).bfloat16() for _ in range(n)] + [q for q, _ in states],
        nones + [scale for _, scale in states], nones * 3,
        [randn(*shape) for _ in range(n)], nones, torch.ones(n),
        [torch.zeros((), dtype=torch.int64) for _ in range(n)],
        torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.1]] * n, dtype=torch.float64),
        torch.zeros((), dtype=torch.int64), [],
        [torch.zeros(shape, dtype=torch.int16), *nones[1:]], [], [0, 0, 1, 2, 1, 2], [-1, 7],
        [0, 1], [],
    )  # fmt: skip


def micro_adam(error_block=64):
    """A bf16 weight with a remainder and one that rounds stochastically, of a block and a rest."""
    shapes, none = ((4100,), (10, 20)), torch.empty(0)
    return (
        [randn(*s).bfloat16() for s in shapes],
        [torch.zeros(3, k, dtype=torch.int16) for k in (42, 5)],
        [torch.zeros(3, k, dtype=torch.bfloat16) for k in (42, 5)],
        [torch.zeros(k, dtype=torch.uint8) for k in (2050, 100)],
        [torch.zeros(-(-n // error_block), 2, dtype=torch.bfloat16) for n in (4100, 200)],
        [randn(*s) for s in shapes], [none] * 2, torch.ones(2),
        [torch.zeros((), dtype=torch.int64) for _ in range(2)],
        torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.1, 0.5]] * 2, dtype=torch.float64),
        torch.zeros((), dtype=torch.int64),
        [torch.zeros(4100, dtype=torch.int16), none], [41, 0], [error_block] * 2, [-1, 7],
    )  # fmt: skip


def adam_4bit():
    """A matrix with rank-1 scales, one that is factored, and a vector."""
    shapes, none = ((40, 20), (40, 20), (130,)), torch.empty(0)
    sizes = [math.prod(s) for s in shapes]
    bytes_ = [torch.zeros((n + 1) // 2, dtype=torch.uint8) for n in sizes]
    groups = [torch.zeros(-(-n // 128)) for n in sizes]
    return (
        [randn(*s).bfloat16() for s in shapes], bytes_, groups,
        [torch.zeros(400, dtype=torch.uint8), none.byte(), torch.zeros(65, dtype=torch.uint8)],
        [torch.zeros(60), torch.ones(60), torch.zeros(2)], [randn(*s) for s in shapes], [none] * 3,
        torch.ones(3), [torch.zeros((), dtype=torch.int64) for _ in range(3)],
        torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.1]] * 3, dtype=torch.float64),
        torch.zeros((), dtype=torch.int64), [none, none, torch.zeros(130, dtype=torch.int8)],
        [1, 2, 0], [7, 8, -1],
    )  # fmt: skip


A, B = qv.quantize(randn(16, 32)), qv.quantize(randn(48, 32), E5M2)
GEMM = (A.qdata, A.scale, B.qdata, B.scale)
FINE = tuple(
    p
    for i, grain in enumerate(("block", "tile"))
    for p in ops.cast_layouts(randn(32 + 16 * i, 150), E4M3, grain)[:2]
)
LAYOUT = [
    ("tensor", 1, (8, 40)),
    ("row", 1, (3, 5, 40)),
    ("block", 16, (8, 40)),
    ("row", 1, ()),
    ("tile", 1, (130, 40)),
]
NO = torch.empty(0)
LINEAR = (A.qdata, A.scale, qv.quantize(randn(32, 32)).qdata, ONE)  # [16, 32] and [32, 32]
SAVED = qv.quantize(randn(32, 16)).qdata, ONE


X, XT = randn(20, 40), randn(40, 20).t()
NORMALIZED = ops.normalize(X, None, None, 1e-6, True, E4M3, None, None, True, 32)
ACTIVATED = ops.activate(X, X, "silu", None, E4M3, None, None, True, 32)
Y = randn(20, 48)
JOINT = ops.activate(Y, Y, "silu", None, E4M3, None, None, True, 32)


def target():
    return A.qdata.clone(), A.scale.clone(), A.amax.clone()


ENDS = torch.tensor([7, 7, 19])
ROWS = ops.cast_groups(randn(20, 150), ENDS, E4M3, "block")
CASES = [
    *((ops.quantize, (randn(*shape), E4M3, None, None, g, b, True, False, 0))
      for g, b, shape in LAYOUT),
    (ops.quantize, (randn(8, 40).bfloat16(), E5M2, ONE, None, "tensor", 1, True, True, 7)),
    (ops.quantize, (randn(8, 9).t(), torch.float16, None, history(), "tensor", 1, False, False, 0)),
    (ops.quantize, (randn(0, 40), E4M3, None, None, "block", 16, True, False, 0)),
    *((ops.dequantize, (t.qdata, t.scale, dtype, g, b))
      for dtype in (torch.float32, torch.bfloat16)
      for g, b, shape in LAYOUT
      for t in [qv.quantize(randn(*shape), granularity=g, block=b)]),
    (ops.cast_transpose, (randn(20, 30), E4M3, None, None, True)),
    (ops.cast_transpose, (randn(30, 20).t(), E5M2, ONE, None, False)),
    (ops.cast_transpose, (randn(20, 30).half(), E4M3, None, history(), True)),
    *((ops.cast_layouts, (randn(20, 150), E4M3, grain, *flags, False))
      for grain in ("row", "block", "tile")
      for flags in ((True, True, False), (False, True, True), (True, False, False))),
    (ops.cast_layouts, (randn(20, 150), E5M2, "block", True, True, True, True)),
    (ops.normalize_layouts, (X, None, None, 1e-6, False, E4M3, True, True, 128)),
    (ops.normalize_layouts, (XT, randn(40), randn(40), 1e-5, True, E5M2, False, False, 7)),
    (ops.activate_layouts, (X, None, "gelu", None, E4M3, False, True, 32)),
    (ops.activate_layouts, (XT, X, "silu", randn(40), E5M2, True, False, 128)),
    (ops.activate_backward_layouts,
     (X, *ACTIVATED[4:6], None, None, "gelu", None, 32, E5M2, True)),
    (ops.activate_backward_layouts,
     (X, *ACTIVATED[4:8], "silu", randn(40), 32, E4M3, False)),
    (ops.normalize, (X, None, None, 1e-6, False, E4M3, None, None, True, 32, False)),
    (ops.normalize, (XT, randn(40), randn(40), 1e-5, True, E5M2, ONE, None, True, 7, True)),
    (ops.normalize, (X.half(), None, None, 1e-6, True, E4M3, None, history(), True, 16, False)),
    (ops.normalize_backward, (X, *NORMALIZED[4:], None, 32, False, torch.float32)),
    (ops.normalize_backward, (X, *NORMALIZED[4:], randn(40), 32, True, torch.bfloat16)),
    (ops.activate, (X, None, "gelu", None, E4M3, None, None, True, 32, True)),
    (ops.activate, (X, X + 1, "silu", randn(40), E4M3, None, history(), True, 8, False)),
    (ops.activate, (XT, X, "gelu_tanh", None, E5M2, ONE, None, False, 32, True)),
    (ops.activate_backward,
     (X, *ACTIVATED[4:6], None, None, "gelu", None, 32, E5M2, None, None, True, False, False)),
    (ops.activate_backward,
     (X, *ACTIVATED[4:8], "silu", randn(40), 32, E5M2, history(), history(), True, True,
      False)),
    (ops.activate_backward,
     (Y, *JOINT[4:8], "silu", None, 32, E5M2, history(), None, True, True, True)),
    (ops.gemm, (*GEMM, None, torch.bfloat16, True)),
    (ops.gemm, (*GEMM, randn(48), torch.float32, False)),
    (ops.gemm, (*FINE, None, torch.bfloat16, True)),
    (ops.gemm_, (randn(16, 48), *GEMM, None, True, True)),
    (ops.gemm_, (randn(16, 48).bfloat16(), *GEMM, randn(48), False, False)),
    (ops.gemm_quantize, (*GEMM, None, E4M3, ONE, True)),
    (ops.gemm_quantize, (*GEMM, randn(48).bfloat16(), E5M2, ONE, False)),
    *((ops.cast_groups, (randn(20, 150), ENDS, E4M3, *of))
      for of in (("tensor", True, True, False), ("row", True, False, False),
                 ("block", True, True, True), ("block", False, True, False))),
    *((ops.cast_stack, (randn(2, 20, 150), E4M3, *of))
      for of in (("tensor", None, True, True, True), ("tensor", ONE.repeat(2), False, True, True),
                 ("row", None, True, False, False), ("tile", None, True, True, False))),
    (ops.grouped_gemm, (*ROWS[:2], *ops.cast_stack(randn(3, 24, 150), E4M3, "tile")[:2], ENDS, 24,
                        torch.bfloat16, True)),
    (ops.grouped_gemm_weight, (*ROWS[2:], *ROWS[2:], ENDS, 150, 150, torch.float32, False)),
    (ops.linear, (randn(3, 5, 20), None, None, randn(24, 20), None, randn(24), 24, E4M3, E4M3,
                  torch.float32, True, False, history())),
    (ops.linear, (randn(10, 30), *LINEAR, None, 20, E4M3, E4M3, torch.bfloat16,
                  False, False, None)),
    (ops.linear, (randn(7, 20), None, None, randn(20, 24), None, None, 24, E4M3, E4M3,
                  torch.float32, False, True, None)),
    (ops.linear_backward, (randn(2, 5, 20), None, None, None, *LINEAR[2:], *SAVED, None, 20, 30,
                           E5M2, E4M3, torch.float32, torch.bfloat16, None, False, history())),
    (ops.linear_backward, (randn(10, 20), None, None, None, randn(20, 30), ONE, *SAVED,
                           randn(30), 20, 30, E5M2, E4M3, torch.float32, torch.float32, E4M3, False,
                           None)),
    (ops.linear_backward, (randn(18, 20), None, None, None, randn(20, 30), ONE, None, None, None,
                           20, 30, E5M2, E4M3, torch.float32, torch.float32, None, False, None)),
    (ops.grad_norm, ([randn(4, 5), A.qdata], [NO, A.scale], [NO, A.amax])),
    (ops.subset_sums,
     ([randn(4, 5), randn(4, 5).half(), A.qdata], [NO, NO, A.scale], [NO, NO, A.amax],
      [3, -5, 0])),
    (ops.accumulate_, (*target(), randn(16, 32), None, None)),
    (ops.accumulate_, (*target(), A.qdata, A.scale, A.amax)),
    (ops.adam_, adam()),
    (ops.share_scales, (randn(3, 5).abs(), None, E4M3)),
    (ops.share_scales, (randn(3, 5).abs(), torch.ones(5), E5M2)),
    (ops.pack, ([randn(4, 5), A.qdata], [NO, A.scale], torch.ones(2), E4M3, 560)),
    (ops.pack, ([randn(7)], [NO], None, torch.float32, 16)),
    (ops.reduce_shards, (torch.stack([A.qdata.view(-1)] * 2), ONE[None], ONE[None] * 4, [512], 0,
                         E4M3)),
    (ops.reduce_shards, (randn(3, 32), None, None, [5, 9], 16, torch.float32)),
    (ops.adam_, adam_in_groups()),
    (ops.adam_4bit_, adam_4bit()),
    (ops.micro_adam_, micro_adam()),
    (ops.micro_adam_, micro_adam(4112)),
    (ops.encode_state, (randn(10, 20).bfloat16(), E5M2, True)),
    (ops.encode_state, (randn(20, 10).t(), E4M3, False)),
    (ops.rotate, ([randn(2, 3, 4, 6), randn(2, 3, 1, 6)], randn(3, 6), randn(3, 6), 4, True)),
    (ops.rotate,
     ([randn(2, 4, 3, 6).bfloat16().transpose(1, 2)], randn(3, 6), randn(3, 6), 4, False)),
    (ops.nf4_encode, (randn(10, 13).bfloat16(), 64)),
    (ops.nf4_encode, (randn(13, 11).t(), 128)),
    (ops.nf4_decode, (*ops.nf4_encode(randn(10, 13), 64), 130, torch.bfloat16, 64)),
    (ops.nf4_decode, (*ops.nf4_encode(randn(143), 128), 143, torch.float16, 128)),
    (ops.decode_state, (*ops.encode_state(randn(10, 20), E4M3, True), True)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args"), CASES, ids=lambda x: str(x) if callable(x) else "")
def test_opcheck(op, args):
    flat = [a for arg in args for a in (arg if isinstance(arg, list) else [arg])]
    takes_fp8 = any(isinstance(a, torch.Tensor) and a.dtype in FP8 for a in flat)
    # torch compares arguments by allclose, which knows no FP8; test_arguments does it by bits.
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    opcheck(op.default, args, test_utils=tests if takes_fp8 else ["test_schema", *tests])


def tensors(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("op", "args"), CASES, ids=lambda x: str(x) if callable(x) else "")
def test_arguments_change_and_alias_as_the_schema_says(op, args):
    args = copy.deepcopy(args)
    before = copy.deepcopy(args)
    out = op(*args)
    for argument, now, then in zip(op.default._schema.arguments, args, before, strict=True):
        if argument.alias_info is not None and argument.alias_info.is_write:
            continue
        for a, b in zip(tensors(now), tensors(then), strict=True):
            assert_same(a, b, argument.name)
    inputs = {t.untyped_storage().data_ptr() for t in tensors(args) if t.numel()}
    assert not inputs & {t.untyped_storage().data_ptr() for t in tensors(out) if t.numel()}


def test_every_op_is_checked():
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if "quaver::" in n}
    # Collectives need their peers: tests/test_comm.py. No graph of a compiler holds them.
    names = {name for name in names if not name.startswith("comm_")}
    assert names == {op._qualified_op_name.split("::")[1] for op, _ in CASES}


@pytest.mark.parametrize(
    ("op", "make"),
    [(ops.adam_, adam_in_groups), (ops.adam_4bit_, adam_4bit), (ops.micro_adam_, micro_adam)],
)
def test_a_tensor_that_two_parameters_would_write_is_refused(op, make):
    """By name, before a weight or a step changes. Threads would decide what it holds."""
    schema, tried = op.default._schema.arguments, 0
    for i in [i for i, a in enumerate(schema) if a.alias_info and "List" in str(a.type)]:
        args = [list(a) if isinstance(a, list) else a for a in make()]
        if len(args[i]) < 2 or not args[i][0].numel():
            continue
        args[i][1], tried = args[i][0], tried + 1
        before = [w.clone() for w in args[0]]
        with pytest.raises(ValueError, match="_: a tensor is there twice"):
            op(*args)
        for weight, was in zip(args[0], before, strict=True):
            assert torch.equal(weight, was)
    assert tried >= 2
