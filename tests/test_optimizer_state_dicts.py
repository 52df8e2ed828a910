"""AdamW over state codecs: resumption, skipped steps, copies, options, and refusals."""

import copy
import dataclasses
import io
import itertools

import pytest
import torch
from helpers import FP8, assert_same, randn
from state_codecs import COAT, state_of, with_states
from torch import nn

import quaver as qv
from quaver import recipe, reference
from quaver.layout import FLAT_BLOCK
from quaver.optim import STATES
from quaver.optim.states import SCALINGS

E4M3 = FP8[0]
INF = float("inf")


def assert_unchanged(before, after):
    for a, b in zip(before, after, strict=True):
        assert_same(a, b)


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 56), nn.GELU(), nn.LayerNorm(56), nn.Linear(56, 8))
    return net.to(dtype)


def train(net, optimizer, count, first=0):
    losses = []
    for i in range(first, first + count):
        x = randn(32, 40, seed=i, dtype=next(net.parameters()).dtype)
        optimizer.zero_grad()
        loss = (net(x).float() - x[:, :8].float().tanh()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


RECIPES = [COAT, with_states("e4m3-expand", bf16_master="remainder"),
           with_states("e4m3-expand", bf16_master="remainder8"),
           with_states("e5m2-expand", "e5m2", bf16_master="nearest")]  # fmt: skip


@pytest.mark.parametrize("chosen", RECIPES, ids=lambda r: r.bf16_master)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_unconverted_models_train_and_resume_bit_for_bit(chosen, dtype, tmp_path):
    net = small_model(dtype)
    optimizer = qv.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0, recipe=chosen)
    losses = train(net, optimizer, 60)
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    qv.save(tmp_path / "at60", net, optimizer, step=60)
    twins = []
    for way in ("torch", "quaver", "deepcopy"):
        if way == "deepcopy":
            twins.append(copy.deepcopy((net, optimizer)))
            continue
        twin = small_model(dtype)
        other = qv.AdamW(twin.parameters(), lr=1.0, recipe=chosen)
        if way == "torch":
            saved = torch.load(file, weights_only=True)
            twin.load_state_dict(saved[0])
            other.load_state_dict(saved[1])
        else:
            assert qv.load(tmp_path / "at60", twin, other)["step"] == 60
        twins.append((twin, other))
    wanted = train(net, optimizer, 5, 60)
    for twin, other in twins:
        assert train(twin, other, 5, 60) == wanted
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert_unchanged(state_of(optimizer, p), state_of(other, q))


def test_bytes_of_a_bf16_model_by_memory_report():
    net = nn.Linear(1024, 512, bias=False).bfloat16()
    for master, extra in (("stochastic", 0), ("remainder", 2), ("remainder8", 1)):
        chosen = dataclasses.replace(COAT, bf16_master=master)
        optimizer = qv.AdamW(net.parameters(), recipe=chosen)
        net(randn(2, 1024, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        per = qv.memory_report(net, optimizer)["bytes_per_param"]
        assert per["exp_avg"] + per["exp_avg_sq"] == 2 + 8 / 128 <= 2.10
        assert per["weight"] + per["master"] == 2 + extra


@pytest.mark.parametrize("chosen", RECIPES, ids=lambda r: r.bf16_master)
@pytest.mark.parametrize("bad", [INF, -INF, float("nan")])
def test_a_non_finite_gradient_leaves_states_untouched(chosen, bad):
    net = small_model(torch.bfloat16)
    optimizer = qv.AdamW(net.parameters(), recipe=chosen)
    train(net, optimizer, 2)
    before = [state_of(optimizer, p) for p in net.parameters()]
    net[3].bias.grad[1] = bad
    optimizer.step()
    assert optimizer.skipped == 1
    for p, wanted in zip(net.parameters(), before, strict=True):
        assert_unchanged(wanted, state_of(optimizer, p))


def test_converted_weights_have_coats_moments_too():
    chosen = dataclasses.replace(COAT, linear=recipe.get("fp8lm-o2").linear)
    net = qv.convert(small_model(), chosen)
    optimizer = qv.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0, recipe="coat")
    losses = train(net, optimizer, 60)
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])
    for p in net.parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][key].qlayout.expand
            assert optimizer.state[p][key].qdata.dtype == E4M3
    # The FP8 copies come out of the same pass, of pieces that begin with a group.
    layer = net[0]
    copies = layer.refresh()
    row, _ = reference.fp8_weight(layer.weight.qdata, layer.weight.scale)
    n, k = layer.weight.shape
    assert_same(copies.q[:n, :k].contiguous(), row)
    assert_same(copies.qt[:k, :n].contiguous(), row.t().contiguous())


def test_hyperparameters_stay_where_a_graph_reads_them():
    p = nn.Parameter(randn(4, 4))
    p.grad = randn(4, 4)
    optimizer = qv.AdamW([p], lr=1e-2, recipe="coat")
    optimizer.step()
    ((_, _, table),) = optimizer._hyper._kept.values()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 5e-3
    assert table[0, 0] == 1e-2
    optimizer.write_hyper()
    assert table[0, 0] == 5e-3
    optimizer.step()
    assert next(iter(optimizer._hyper._kept.values()))[2] is table


def test_a_parameter_that_changes_is_named():
    p = nn.Parameter(randn(4, 6, dtype=torch.bfloat16))
    p.grad = torch.zeros(4, 6, dtype=torch.bfloat16)
    optimizer = qv.AdamW([p], recipe="coat")
    optimizer.step()
    p.data = p.data.float()
    p.grad = torch.zeros(4, 6)
    with pytest.raises(
        RuntimeError, match=r"changed from torch.bfloat16 \[4, 6\] to torch.float32 \["
    ):
        optimizer.step()
    q = nn.Parameter(randn(4, 6))
    q.grad = torch.zeros(4, 6)
    optimizer = qv.AdamW([q], recipe="coat")
    optimizer.step()
    q.data = torch.zeros(4, 7)
    q.grad = torch.zeros(4, 7)
    with pytest.raises(
        RuntimeError, match=r"changed from torch.float32 \[4, 6\] to torch.float32 \[4, 7\]"
    ):
        optimizer.step()


def test_foreign_state_dicts_are_refused_and_nothing_is_lost():
    net = small_model()
    optimizer = qv.AdamW(net.parameters(), recipe="coat")
    train(net, optimizer, 2)
    before = [state_of(optimizer, p) for p in net.parameters()]
    theirs = small_model()
    torchs = torch.optim.AdamW(theirs.parameters())
    train(theirs, torchs, 1)
    o2 = qv.AdamW(theirs.parameters(), recipe=with_states("e4m3-tensor", "f16-tensor"))
    train(theirs, o2, 1)
    remainder = small_model(torch.bfloat16)
    with_master = qv.AdamW(remainder.parameters(), recipe=RECIPES[1])
    train(remainder, with_master, 1)
    missing = copy.deepcopy(optimizer.state_dict())
    del missing["state"][0]["exp_avg_sq"]
    narrow = copy.deepcopy(optimizer.state_dict())
    narrow["state"][0]["exp_avg"] = STATES["e4m3-expand"].zeros(torch.zeros(3))
    cases = [
        (
            torchs.state_dict(),
            "0 counts its steps in float32, as torch.optim.*; go on with torch's",
        ),
        (o2.state_dict(), "exp_avg e4m3 with tensor scale .* keeps it as e4m3-exp"),
        (
            with_master.state_dict(),
            "has exp_avg, exp_avg_sq, remainder, step; wanted .*of the recipe that saved it",
        ),
        (missing, "has exp_avg, step; wanted exp_avg, exp_avg_sq, step"),
        (narrow, r"of shape \[3\]; recipe coat keeps it as e4m3-expand of shape \[56, 40\]"),
    ]
    for foreign, message in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(foreign)
        for p, wanted in zip(net.parameters(), before, strict=True):
            assert_unchanged(wanted, state_of(optimizer, p))


def test_unknown_codecs_and_masters_are_refused():
    p = nn.Parameter(randn(2))
    with pytest.raises(ValueError, match=r"exp_avg must be one of f32, .*, got 'int8'"):
        qv.AdamW([p], recipe=with_states("int8"))
    with pytest.raises(ValueError, match="bf16_master must be one of nearest, stochastic, rem"):
        qv.AdamW([p], recipe=with_states("e4m3", bf16_master="up"))


def test_scalings_are_those_of_the_core():
    assert list(SCALINGS.values()) == [0, 1, 2]
    assert {(c.layout.grain, c.layout.expand) for c in STATES.values()} == set(SCALINGS)
    assert all(a == b for a, b in itertools.pairwise([128, FLAT_BLOCK, reference.GROUP]))


def test_options_that_frameworks_pass_are_taken_or_refused_by_name():
    """torchtitan passes fused and foreach, others what torch's optimizers have."""
    p = nn.Parameter(randn(3, 4))
    plain = {"foreach": False, "amsgrad": False, "maximize": False, "differentiable": False}
    for options in (
        {"fused": True},
        {"fused": False, "foreach": None},
        {"capturable": True},
        plain,
    ):
        optimizer = qv.AdamW([p], lr=1e-3, **options)
        assert set(optimizer.param_groups[0]) == {"params", "lr", "betas", "eps", "weight_decay"}
    for option in plain:
        with pytest.raises(ValueError, match=f"AdamW: {option}=True is not supported"):
            qv.AdamW([p], **{option: True})


def test_states_of_f32_go_on_in_torchs_adamw():
    """Such states are plain tensors. A step from them is torch's own, to f32 rounding."""
    nets = [small_model(), small_model()]
    ours = qv.AdamW(nets[0].parameters(), lr=1e-2, recipe="f32")
    train(nets[0], ours, 3)
    nets[1].load_state_dict(nets[0].state_dict())
    theirs = torch.optim.AdamW(nets[1].parameters(), lr=1e-2)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert train(nets[0], ours, 3, 3) == pytest.approx(train(nets[1], theirs, 3, 3), rel=1e-4)


def test_a_damaged_step_count_is_refused():
    net = small_model()
    optimizer = qv.AdamW(net.parameters(), recipe="coat")
    train(net, optimizer, 1)
    for count in (-1, 2**63 - 1):
        damaged = copy.deepcopy(optimizer.state_dict())
        damaged["state"][1]["step"].fill_(count)
        with pytest.raises(ValueError, match=f"parameter 1 has taken {count} steps; wanted 0 or"):
            optimizer.load_state_dict(damaged)


def test_a_copied_optimizer_shares_nothing_and_steps_alike():
    nets = [small_model(torch.bfloat16)]
    optimizers = [qv.AdamW(nets[0].parameters(), lr=1e-2, recipe="coat")]
    train(nets[0], optimizers[0], 2)
    twin = copy.deepcopy((nets[0], optimizers[0]))
    nets.append(twin[0])
    optimizers.append(twin[1])
    losses = [train(n, o, 3, 2) for n, o in zip(nets, optimizers, strict=True)]
    assert losses[0] == losses[1]
    assert optimizers[0].describe() == optimizers[1].describe()
