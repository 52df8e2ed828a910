"""Moments of 4 bits: the step bit for bit against the oracle, what it promises, its states."""

import copy

import pytest
import torch
from helpers import assert_same, isa, threads

import quaver as qv
from quaver import reference
from quaver.optim.packed import second_of

RECIPES = {
    "adamw-4bit": "linear4-rank1",
    "adamw-4bit-block": "linear4",
    "adamw-4bit-factor": "factor",
}
CODED = ("adamw-4bit", "adamw-4bit-block")
SHAPES = ((70, 65), (4099,), (8, 9, 7, 11), (3, 2000, 3), (257, 129), (1, 5000), (5000, 1))
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ISAS = qv._C.available_isas()


def parameters(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_grads(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        x = torch.randn(p.shape, generator=generator) * scale
        x[torch.rand(p.shape, generator=generator) < 0.05] = 0
        if p.dim() > 1:
            x[0] = 0  # a row that has no gradient yet
        p.grad = x.to(p.dtype)


def adamw(params, recipe, **options):
    return qv.AdamW(params, recipe=recipe, **{**HYPER, **options})


def oracle_step(w, state, p, t, second):
    hyper = (HYPER["lr"], *HYPER["betas"], HYPER["eps"], HYPER["weight_decay"])
    return reference.adamw_4bit(w, state, p.grad, t, *hyper, second_of(p, second))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("recipe", CODED)
def test_steps_have_the_bits_of_the_oracle(recipe, name):
    params = parameters()
    opt = adamw(params, recipe)
    weights = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in opt.state_of(p).items()} for p in params]
    for t in range(1, 6):
        set_grads(params, t, 10.0 ** (t % 3))
        with isa(name), threads(2):
            opt.step()
        for i, p in enumerate(params):
            weights[i] = oracle_step(weights[i], states[i], p, t, RECIPES[recipe])
            assert_same(p.detach(), weights[i])
            for key in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"):
                assert_same(opt.state[p][key], states[i][key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factored_second_moment_is_adafactors(dtype):
    """Means of squares by rows and columns; their products step as the oracle says, whose weight a
    bf16 parameter rounds within an ulp. A norm adds up to 5000 squares in 16 or more lanes, each
    sum off by up to 2^-24: 2e-5, and half of it in the root of a step of 1e-2."""
    params = [p for p in parameters(dtype=dtype) if p.dim() > 1]
    opt = adamw(params, "adamw-4bit-factor")
    weights = [p.detach().float() for p in params]
    states = [{k: v.clone() for k, v in opt.state_of(p).items()} for p in params]
    for t in range(1, 4):
        set_grads(params, t)
        for i, p in enumerate(params):
            square, s = p.grad.double().square(), states[i]
            row, col = s["exp_avg_sq_row"].double(), s["exp_avg_sq_col"].double()
            row, col = 0.95 * row + 0.05 * square.mean(-1), 0.95 * col + 0.05 * square.mean(-2)
            s |= {"exp_avg_sq_row": row, "exp_avg_sq_col": col}
            mean = row.mean(-1, keepdim=True).clamp_min(1e-38)
            s["exp_avg_sq_scale"] = torch.cat([(row / mean).flatten(), col.flatten()]).float()
            weights[i] = oracle_step(p.detach(), s, p, t, "factor")
        opt.step()
        for p, w, s in zip(params, weights, states, strict=True):
            tolerance = 1e-6 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(p.detach().float(), w, rtol=tolerance, atol=1e-6)
            for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
                torch.testing.assert_close(opt.state[p][key], s[key].float(), rtol=2e-5, atol=0)


def test_blocks_step_as_torchaos_4_bit_adam_does():
    """Over 20 steps within 1e-6: the two round m and v at other places."""
    pytest.importorskip("torchao")
    from torchao.optim import subclass_4bit
    from torchao.optim.adam import single_param_adam

    torch.manual_seed(0)
    w = torch.randn(64, 128) / 10
    p, other = torch.nn.Parameter(w.clone()), w.clone()
    opt = adamw([p], "adamw-4bit-block", lr=1e-3)
    m, v = (subclass_4bit.OptimState4bit.zeros(w.shape, signed, 128) for signed in (True, False))
    for t in range(1, 21):
        p.grad = torch.randn_like(w)
        opt.step()
        lr, step = torch.tensor(1e-3), torch.tensor(float(t))
        single_param_adam(
            other, p.grad, step, m, v, None, lr, *HYPER["betas"], HYPER["weight_decay"],
            HYPER["eps"], IS_ADAMW=True, BF16_STOCHASTIC_ROUND=False,
        )  # fmt: skip
    torch.testing.assert_close(p.detach(), other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_of_zero_and_blocks_of_zero_stay_finite(recipe):
    params = parameters()
    opt = adamw(params, recipe)
    for t in range(4):
        for p in params:
            p.grad = torch.zeros_like(p) if t < 2 else torch.full_like(p, 1e-20 * t)
        opt.step()
        assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("recipe", RECIPES)
def test_small_parameters_keep_f32_and_a_group_can_ask_for_it(recipe):
    small, large = parameters(((64, 64), (64, 65)))
    opt = adamw([{"params": [small]}, {"params": [large]}], recipe)
    kept = adamw([{"params": [large], "compress": False}], recipe)
    assert opt.state_of(small)["exp_avg"].dtype == torch.float32
    assert opt.state_of(large)["exp_avg"].dtype == torch.uint8
    assert kept.state_of(large)["exp_avg"].dtype == torch.float32
    plain = torch.optim.AdamW([p := torch.nn.Parameter(small.detach().clone())], **HYPER)
    set_grads([small, large], 0)
    p.grad = small.grad.clone()
    opt.step()
    plain.step()
    torch.testing.assert_close(small, p, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_nothing(recipe, bad):
    params = parameters(((3, 5), *SHAPES))
    opt = adamw(params, recipe)
    set_grads(params, 1)
    opt.step()
    before = copy.deepcopy([opt.state_dict(), [p.detach() for p in params]])
    set_grads(params, 2)
    params[1].grad[5, 5] = bad
    opt.step()
    assert opt.skipped == 1
    after = [opt.state_dict(), [p.detach() for p in params]]
    for x, y in zip(*map(torch.utils._pytree.tree_leaves, (before, after)), strict=True):
        assert_same(x, y) if isinstance(x, torch.Tensor) else None


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Linear(96, 130), torch.nn.GELU(), torch.nn.Linear(130, 7)
    return torch.nn.Sequential(*layers).to(dtype)


def train(net, opt, first, last):
    for step in range(first, last):
        set_grads(list(net.parameters()), step)
        opt.step()


@pytest.mark.parametrize("way", ["save", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", ["stochastic", "remainder", "remainder8"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    tmp_path, recipe, master, dtype, way
):
    import dataclasses

    recipe = dataclasses.replace(qv.recipe.get(recipe), bf16_master=master)
    whole, here, there = model(dtype), model(dtype), model(dtype)
    opt, part, other = (adamw(m.parameters(), recipe) for m in (whole, here, there))
    train(whole, opt, 0, 9)
    train(here, part, 0, 5)
    if way == "save":
        qv.save(tmp_path / "run", here, part)
        qv.load(tmp_path / "run", there, other)
    else:
        there.load_state_dict(copy.deepcopy(here.state_dict()))
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    train(there, other, 5, 9)
    for p, q in zip(whole.parameters(), there.parameters(), strict=True):
        assert_same(p.detach(), q.detach())
        for key, value in opt.state[p].items():
            assert_same(value, other.state[q][key])


def test_a_state_of_another_recipe_is_refused_and_changes_nothing(tmp_path):
    here, there = model(), model()
    part = adamw(here.parameters(), "adamw-4bit")
    train(here, part, 0, 2)
    qv.save(tmp_path / "run", here, part)
    for recipe in ("adamw-4bit-block", "adamw-4bit-factor", "f32"):
        other = adamw(there.parameters(), recipe)
        with pytest.raises(ValueError, match="the state of parameter 0 has"):
            other.load_state_dict(part.state_dict())
        with pytest.raises(qv.CheckpointError, match="adamw-4bit"):
            qv.load(tmp_path / "run", there, other)
        assert not other.state


def bytes_a_parameter(shapes, recipe):
    params = [torch.nn.Parameter(torch.empty(s, device="meta")) for s in shapes]
    opt = qv.AdamW(params, 1e-4, recipe=recipe)
    states = [t for p in params for t in opt.state_of(p).values()]
    return sum(t.nbytes for t in states) / sum(p.numel() for p in params)


@pytest.mark.parametrize(
    ("recipe", "bar"),
    [("adamw-4bit", 1.04), ("adamw-4bit-block", 1.07), ("adamw-4bit-factor", 0.54)],
)
def test_bytes_of_a_7b_model_are_within_the_bar(recipe, bar):
    d, ffn, vocab = 4096, 11008, 32000
    layer = [(d, d)] * 4 + [(ffn, d)] * 2 + [(d, ffn), (d,), (d,)]
    shapes = layer * 32 + [(vocab, d), (d,), (vocab, d)]
    assert bytes_a_parameter(shapes, recipe) <= bar


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_report_counts_every_state_by_kind(recipe):
    net = model(torch.bfloat16)
    opt = adamw(net.parameters(), recipe)
    train(net, opt, 0, 1)
    report = qv.memory_report(net, opt)
    states = [opt.state[p] for p in net.parameters()]
    for kind in ("exp_avg", "exp_avg_sq"):
        names = {"exp_avg": ("exp_avg", "exp_avg_scale")}.get(kind) or (
            "exp_avg_sq", "exp_avg_sq_scale", "exp_avg_sq_row", "exp_avg_sq_col"
        )  # fmt: skip
        assert report[kind] == sum(s[n].nbytes for s in states for n in names if n in s)
    assert report["other"] == 8 * len(states)


def test_what_4_bits_cannot_hold_is_refused_by_name():
    for first, second in (("dynamic4", "f32"), ("f32", "linear4"), ("e4m3", "factor")):
        with pytest.raises(ValueError, match='exp_avg "dynamic4" goes with one of exp_avg_sq'):
            qv.recipe.Recipe("x", exp_avg=first, exp_avg_sq=second)
    master = qv.recipe.LinearRecipe(master="f16-tensor")
    with pytest.raises(ValueError, match="moments of 4 bits are for plain weights"):
        qv.recipe.Recipe("x", linear=master, exp_avg="dynamic4", exp_avg_sq="linear4")
    scaled = torch.nn.Parameter(qv.quantize(torch.randn(80, 80), torch.float16))
    with pytest.raises(ValueError, match="is for plain parameters"):
        adamw([scaled], "adamw-4bit")
    with pytest.raises(ValueError, match="moment in 4 bits"):
        qv.Grass(model(), 1e-3, recipe="adamw-4bit")


@pytest.mark.parametrize("recipe", RECIPES)
def test_released_gradients_take_the_same_steps(recipe):
    (whole, freed), data = (model(), model()), torch.Generator().manual_seed(0)
    opt, other = adamw(whole.parameters(), recipe), adamw(freed.parameters(), recipe)
    release = qv.release_gradients(freed, other)
    for _ in range(4):
        x = torch.randn(12, 96, generator=data)
        for net, optimizer in ((whole, opt), (freed, other)):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    release.remove()
    for p, q in zip(whole.parameters(), freed.parameters(), strict=True):
        assert_same(p.detach(), q.detach())
