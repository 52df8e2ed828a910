"""torch's own optimizers and helpers over parameters of a converted model: every write arrives."""

import copy

import pytest
import torch
from small import RECIPES, assert_computes_with, batch, distance, mlp, plain, twin_of, values
from torch import nn

import quaver as qv

OPTIMIZERS = {
    "AdamW single": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, nesterov=True, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=3e-2, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=3e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=3e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=10.0),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1.0),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "quaver": lambda p: qv.AdamW(p, lr=1e-2),
}


def train(model, optimizer, steps=20, micro_batches=1):
    """Returns the loss before the last step."""
    x, y = batch()
    for _ in range(steps):
        for _ in range(micro_batches):
            loss = nn.functional.mse_loss(model(x), y) / micro_batches
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item() * micro_batches


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_optimizer_of_torch(recipe, kind):
    """Trains as it trains the plain model; and what the layers multiply by is the parameters."""
    model = mlp(recipe)
    twin, start = twin_of(model), values(model)
    before = nn.functional.mse_loss(model(batch()[0]), batch()[1]).item()
    wanted = train(twin, OPTIMIZERS[kind](twin.parameters()))
    got = train(model, OPTIMIZERS[kind](model.parameters()))
    assert wanted < 0.95 * before, "the plain model learns, in bf16 where convert made it so"
    assert got == pytest.approx(wanted, abs=0.1 * before)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert distance(p, start[name]) >= 0.5 * distance(q, start[name]), name
    assert_computes_with(model, values(model))


@pytest.mark.parametrize("recipe", RECIPES)
def test_many_micro_batches(recipe):
    """256 gradients add up as they do in torch's bf16, or better."""
    alone, together = mlp(recipe), mlp(recipe)
    exact = rounded = None
    for seed in range(256):
        x, y = batch(16, seed)
        for model in (alone, together):
            nn.functional.mse_loss(model(x), y).backward()
        grads = [p.grad.detach() for p in alone.parameters()]
        alone.zero_grad()
        if exact is None:
            exact, rounded = [g.double() for g in grads], [g.bfloat16() for g in grads]
        else:
            exact = [total + g.double() for total, g in zip(exact, grads, strict=True)]
            rounded = [total + g.bfloat16() for total, g in zip(rounded, grads, strict=True)]
    for p, wanted, low in zip(together.parameters(), exact, rounded, strict=True):
        assert distance(p.grad, wanted) <= 1.1 * distance(low, wanted) < 0.03


# torch's optimizers round a plain bf16 parameter, which is coat's, to nearest: converted or not.
WHOSE = [
    (recipe, kind)
    for recipe in RECIPES
    for kind in ("torch", "fused", "quaver")
    if recipe != "coat" or kind == "quaver"
]


@pytest.mark.parametrize("lr", [5e-6, 5e-7])
@pytest.mark.parametrize("recipe, kind", WHOSE)
def test_small_steps_move_the_weights(recipe, kind, lr):
    """A constant gradient moves each weight by lr a step; the mean over weights shows it."""
    model = mlp(recipe)
    make = {
        "torch": lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
        "fused": lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0, fused=True),
        "quaver": lambda p: qv.AdamW(p, lr=lr, weight_decay=0.0, recipe=recipe),
    }[kind]
    torch.manual_seed(0)
    optimizer, start = make(model.parameters()), values(model)
    steps = 40
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones(p.shape, dtype=p.dtype)
        optimizer.step()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            moved = (start[name] - plain(weight)).mean().item()
            # 4,096 weights whose rounding is a coin of the format's spacing, 2^-11 of 2^-3 at most.
            spread = 2**-14 * (steps / 4096) ** 0.5 / 2
            assert moved == pytest.approx(lr * steps, rel=0.05, abs=4 * spread), name


@pytest.mark.parametrize("recipe, kind", WHOSE)
def test_decay_alone_shrinks_the_weights(recipe, kind):
    model = mlp(recipe)
    torch.manual_seed(0)
    make = {
        "torch": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
        "quaver": lambda p: qv.AdamW(p, lr=1e-3, weight_decay=0.1, recipe=recipe),
    }[kind]
    optimizer, start = make(model.parameters()), values(model)
    for _ in range(300):
        for p in model.parameters():
            p.grad = torch.zeros(p.shape, dtype=p.dtype)
        optimizer.step()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            left = (plain(p) * start[name]).sum() / (start[name] ** 2).sum()
            assert left.item() == pytest.approx(0.970, abs=0.003), name


def average_of_doubled(model, decay):
    """What 50 updates at `decay` make of `model`'s average, after its parameters were doubled."""
    torch.manual_seed(0)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(plain(p) * 2)
    for _ in range(50):
        average.update_parameters(model)
    return average.module


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_averaged_model_follows(recipe, decay):
    """torch.optim.swa_utils: the average moves as far as it should, or, where the parameters are
    plain ones in bf16, as far as it does without quaver."""
    model = mlp(recipe)
    start = values(model)
    twin = twin_of(model)
    average = average_of_doubled(model, decay)
    if model[0].weight.dtype == torch.bfloat16:
        wanted = values(average_of_doubled(twin, decay))
        assert all(torch.equal(p, wanted[n]) for n, p in values(average).items())
    else:
        for name, p in values(average).items():
            got = ((p - start[name]) * start[name]).sum() / (start[name] ** 2).sum()
            assert got.item() == pytest.approx(1 - decay**50, rel=0.02, abs=1e-4), name
    assert_computes_with(average, values(average))


@pytest.mark.parametrize("recipe", RECIPES)
def test_vectors_of_parameters(recipe):
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    model = mlp(recipe)
    model(batch()[0])
    vector = parameters_to_vector(model.parameters()).detach().clone().float()
    assert torch.equal(vector, torch.cat([p.reshape(-1) for p in values(model).values()]))
    vector_to_parameters(-2 * vector, model.parameters())
    found = torch.cat([p.reshape(-1) for p in values(model).values()])
    assert torch.equal(found, -2 * vector)
    assert_computes_with(model, values(model))


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_clipped_by_torch(recipe):
    x, y = batch()
    for clip in (
        lambda p: torch.nn.utils.clip_grad_norm_(p, 1e-3, foreach=False),
        lambda p: torch.nn.utils.clip_grad_norm_(p, 1e-3, foreach=True),
    ):
        model = mlp(recipe)
        nn.functional.mse_loss(model(x), y).backward()
        before = [plain(p.grad) for p in model.parameters()]
        norm = clip(list(model.parameters()))
        wanted = torch.cat([g.reshape(-1) for g in before]).norm().item()
        assert norm.item() == pytest.approx(wanted, rel=2**-8)
        for p, old in zip(model.parameters(), before, strict=True):
            assert distance(p.grad, old * 1e-3 / norm) < 0.05
    for foreach in (False, True):
        model = mlp(recipe)
        nn.functional.mse_loss(model(x), y).backward()
        before = [plain(p.grad) for p in model.parameters()]
        bound = before[0].abs().median().item()
        torch.nn.utils.clip_grad_value_(model.parameters(), bound, foreach=foreach)
        for p, old in zip(model.parameters(), before, strict=True):
            assert distance(p.grad, old.clamp(-bound, bound)) < 0.05


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_grad_scaler(recipe):
    """GradScaler finds an infinity, skips that step, and unscales the others."""
    x, y = batch()
    model = mlp(recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    twin = mlp()
    nn.functional.mse_loss(twin(x), y).backward()
    scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
    scaler.unscale_(optimizer)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert distance(p.grad, q.grad) < 0.2
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    start = values(model)
    scaler.scale(nn.functional.mse_loss(model(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(p, start[n]) for n, p in values(model).items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameter_groups_that_come_later(recipe):
    model = mlp(recipe)
    first, *rest = model.parameters()
    for make in (torch.optim.AdamW, qv.AdamW):
        optimizer = make([first], lr=1e-2)
        optimizer.add_param_group({"params": rest, "lr": 1e-3})
        start = values(model)
        train(model, optimizer, steps=2)
        moved = [(plain(p) - start[n]).abs().mean() for n, p in model.named_parameters()]
        assert moved[0] > 3 * moved[-1] > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_optimizer_resumes(recipe):
    """state_dict of torch's AdamW, through a deep copy, into a copy of the model."""
    for make in (torch.optim.AdamW, qv.AdamW):
        model = mlp(recipe)
        optimizer = make(model.parameters(), lr=1e-2)
        train(model, optimizer, 5)
        state = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        train(model, optimizer, 5)
        again = mlp(recipe, seed=1)
        resumed = make(again.parameters(), lr=1e-2)
        again.load_state_dict(state[1])
        resumed.load_state_dict(state[0])
        train(again, resumed, 5)
        for name, value in values(model).items():
            # Where torch's arithmetic rounds f16 masters, its seeds are drawn from its generator.
            assert distance(values(again)[name], value) < 2**-9, name
