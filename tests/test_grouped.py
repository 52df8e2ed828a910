"""The grouped ops against a loop of Products, one for each expert: the same bits in fewer calls."""

import itertools

import pytest
import torch
from helpers import assert_same, bits, randn
from test_no_sync import NoSync
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import quaver as qv
from quaver import recipe
from quaver.nn import grouped
from quaver.nn.experts import Experts
from quaver.nn.grouped import GroupedProduct, LoopedProduct
from quaver.nn.weight import freeze_weight

ops = torch.ops.quaver
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RECIPES = ("tensorwise", "rowwise", "blockwise", "coat", "coat-blockwise")
SPLITS = {
    "ragged": [37, 37, 38, 200],
    "one has all": [0, 0, 200, 200],
    "one token each": [1, 2, 3, 4],
    "rows of none": [16, 48, 150, 170],
    "no row": [0, 0, 0, 0],
}


def run(product, x, weight, ends, name, out, input_major, learns=True):
    """The result and both gradients."""
    x = x.clone().requires_grad_()
    if learns:
        weight = weight.clone().requires_grad_()
    rule = recipe.get(name).linear
    y = product.apply(x, weight, ends, rule, out, input_major, learns)
    dy = torch.empty_like(y) if y.is_meta else randn(*y.shape, seed=2, dtype=y.dtype)
    return y.detach(), *torch.autograd.grad(y, [x, weight] if learns else [x], dy)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", SPLITS)
def test_bits_are_those_of_the_loop(split, dtype, input_major, name):
    ends, (k, n) = SPLITS[split], (144, 40)
    x = randn(200, k, dtype=dtype)
    weight = randn(4, *((k, n) if input_major else (n, k)), seed=1, dtype=dtype)
    options = weight, name, dtype, input_major
    wanted = run(LoopedProduct, x, weight, ends, *options[1:])
    found = run(GroupedProduct, x, weight, torch.tensor(ends), *options[1:])
    for mine, of, what in zip(found, wanted, ("y", "dx", "dw"), strict=True):
        assert_same(mine, of, what)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("shape", [(136, 144), (20, 36)])
def test_bits_of_frozen_codes_are_those_of_the_loop(shape, input_major, name):
    x = randn(40, shape[0 if input_major else 1])
    stack = freeze_weight(torch.nn.Parameter(randn(4, *shape), False), recipe.get(name).linear)
    options = name, torch.float32, input_major, False
    wanted = run(LoopedProduct, x, stack, [5, 5, 21, 38], *options)
    found = run(GroupedProduct, x, stack, torch.tensor([5, 5, 21, 38]), *options)
    for mine, of, what in zip(found, wanted, ("y", "dx"), strict=True):
        assert_same(mine, of, what)


@pytest.mark.parametrize("name", RECIPES)
def test_a_value_that_is_not_finite_reaches_what_it_reaches_in_the_loop(name):
    x, weight = randn(40, 144), randn(3, 48, 144, seed=1)
    x[3, 5], weight[2, 7, 9] = torch.inf, torch.nan
    options = name, torch.float32, False
    wanted = run(LoopedProduct, x, weight, [8, 20, 40], *options)
    found = run(GroupedProduct, x, weight, torch.tensor([8, 20, 40]), *options)
    for mine, of in zip(found, wanted, strict=True):
        assert torch.equal(mine.isnan(), of.isnan())
        assert_same(mine.nan_to_num(0.0), of.nan_to_num(0.0))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_host_reads_nothing(name, frozen):
    with torch.device("meta"):
        x, weight = torch.randn(40, 48), torch.nn.Parameter(torch.randn(4, 32, 48))
        ends = torch.zeros(4, dtype=torch.long)
        if frozen:
            weight = freeze_weight(weight.requires_grad_(False), recipe.get(name).linear)
    with NoSync("meta"):
        found = run(GroupedProduct, x, weight, ends, name, torch.bfloat16, False, not frozen)
    assert [t.shape for t in found] == [(40, 32), (40, 48), (4, 32, 48)][: len(found)]


class Counted(TorchDispatchMode):
    """Counts the ops of torch and quaver."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RECIPES)
def test_the_count_of_ops_does_not_grow_with_experts(name):
    counts = {}
    for experts in (4, 16):
        x, weight = randn(64, 32), randn(experts, 16, 32, seed=1)
        ends = torch.arange(1, experts + 1) * (64 // experts)
        with Counted() as mode:
            run(GroupedProduct, x, weight, ends, name, torch.float32, False)
        counts[experts] = mode.count
    assert counts[4] == counts[16] <= 40


def test_a_converted_mixture_multiplies_by_grouped_ops(monkeypatch):
    from test_experts import TOKENS, causal

    def refuse(*args):
        raise AssertionError("a loop")

    monkeypatch.setattr(LoopedProduct, "apply", refuse)
    model = qv.convert(causal("Mixtral"), "blockwise")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    stacks = [m.down_proj for m in model.modules() if isinstance(m, Experts)]
    assert stacks and all(p.grad.any() for p in stacks)


@pytest.mark.parametrize(
    ("capability", "rows", "captures", "loops"),
    [
        ((8, 0), 4, False, True),
        ((8, 9), 4096, False, False),
        ((9, 0), 2 * grouped.LOOPED_ROWS - 1, False, False),
        ((9, 0), 2 * grouped.LOOPED_ROWS, False, True),
        ((9, 0), 2 * grouped.LOOPED_ROWS, True, False),
        ((10, 0), 4096, False, False),
    ],
)
def test_which_gpus_loop_over_experts(monkeypatch, capability, rows, captures, loops):
    called = []
    for product in (LoopedProduct, GroupedProduct):
        monkeypatch.setattr(product, "apply", lambda x, w, ends, *_, of=product: called.append(of))
    monkeypatch.setattr(grouped, "read_ends", lambda ends, rows: called.append("read"))
    monkeypatch.setattr(grouped, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    with FakeTensorMode():
        x, weight = torch.empty(rows, 16, device="cuda"), torch.empty(2, 8, 16, device="cuda")
        ends = torch.empty(2, dtype=torch.long, device="cuda")
    grouped.multiply_groups(x, weight, ends, None, torch.float32, False, True)
    assert called == (["read", LoopedProduct] if loops else [GroupedProduct])


@pytest.mark.parametrize("grain", ["row", "block"])
@pytest.mark.parametrize("tiles_t", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_a_cast_is_that_of_each_group(split, tiles_t, grain):
    tiles_t = tiles_t and grain == "block"
    x, ends = randn(200, 150), SPLITS[split]
    q, scale, qt, qt_scale = ops.cast_groups(
        x, torch.tensor(ends), E4M3, grain, True, False, tiles_t
    )
    for e, (begin, end) in enumerate(itertools.pairwise((0, *ends))):
        rows, first, block = end - begin, 16 * (begin // 16 + e), begin // 128 + e
        if not rows:
            continue
        own = ops.cast_layouts(x[begin:end], E4M3, grain, True, True, False, tiles_t)
        assert_same(bits(q[begin:end]), bits(own[0][:rows]))
        assert_same(scale[begin:end], own[1][:rows])
        assert_same(bits(qt[:, first : first + own[2].shape[1]]), bits(own[2]))
        scales = qt_scale[e] if grain == "row" else qt_scale[:, block : block + own[3].shape[1]]
        assert_same(scales, own[3])
    assert not bits(q[ends[-1] :]).any() and (grain == "row" or (scale[ends[-1] :] == 1).all())


X, ENDS = randn(20, 32), torch.tensor([5, 20])
CODES = ops.cast_groups(X, ENDS, E4M3, "tensor")
STACK = ops.cast_stack(randn(2, 16, 32), E4M3, "tensor")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.cast_groups(X, ENDS.int(), E4M3, "row"), "ends must be contiguous int64"),
        (lambda: ops.cast_groups(X, ENDS.flip(0), E4M3, "row"), "ends must rise from 0 to 20"),
        (lambda: ops.cast_groups(X, ENDS + 1, E4M3, "row"), "at most, got 21 after 6"),
        (lambda: ops.cast_groups(X, ENDS, E4M3, "tile"), "tiles are those of weights"),
        (lambda: ops.cast_groups(X, ENDS, torch.bfloat16, "row"), "dtype must be e4m3 or e5m2"),
        (lambda: ops.cast_stack(X, E4M3, "tile"), r"x must be \[groups, R, C\], got 2"),
        (lambda: ops.cast_stack(X[None], E4M3, "tile", torch.ones(1)), "a given scale goes with"),
        (lambda: ops.grouped_gemm(*CODES[:2], *STACK[:2], ENDS, 20, torch.float32),
         "b of a result of 20 columns must have 32 rows, got 16"),
        (lambda: ops.grouped_gemm(CODES[0], CODES[1][:1], *STACK[:2], ENDS, 16, torch.float32),
         r"scale_a must be \[groups\], \[S, 1\] or \[S, K / 128\], got \[1\]"),
        (lambda: ops.grouped_gemm(X, CODES[1], *STACK[:2], ENDS, 16, torch.float32),
         "a must be e4m3 or e5m2, got f32"),
        (lambda: ops.grouped_gemm_weight(CODES[2], CODES[1], CODES[2][:, :32].contiguous(),
                                         CODES[1], ENDS, 32, 32, torch.float32),
         "a and b must have as many columns, got 48 and 32"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
