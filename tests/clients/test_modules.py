"""What torch's users do with modules: the converted one computes with what it is given."""

import copy
import threading

import pytest
import torch
from small import (
    RECIPES,
    WIDTH,
    assert_computes_with,
    batch,
    distance,
    llama,
    mlp,
    plain,
    twin_of,
    values,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import quaver as qv


def loss_of(model, seed=0):
    x, y = batch(seed=seed)
    return nn.functional.mse_loss(model(x), y)


def same_gradients(model, twin, bound=0.2):
    """Within what FP8 operands leave."""
    for (name, a), b in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert distance(a.grad, b[1].grad) < bound, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_functional_call(recipe):
    """With other parameters, as tensors and as trained ones; the model keeps its own."""
    model, given = mlp(recipe), {n: -p for n, p in values(mlp(seed=3)).items()}
    start = values(model)
    x, y = batch()
    with torch.no_grad():
        wanted = torch.func.functional_call(mlp(), given, (x,))
        assert distance(torch.func.functional_call(model, given, (x,)), wanted) < 0.1
    leaves = {n: p.clone().requires_grad_() for n, p in given.items()}
    nn.functional.mse_loss(torch.func.functional_call(model, leaves, (x,)), y).backward()
    twin = {n: p.clone().requires_grad_() for n, p in given.items()}
    nn.functional.mse_loss(torch.func.functional_call(mlp(), twin, (x,)), y).backward()
    for name, leaf in leaves.items():
        assert distance(leaf.grad, twin[name].grad) < 0.2
    assert all(torch.equal(p, start[n]) for n, p in values(model).items())
    assert_computes_with(model, start)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_by_autograd_grad(recipe):
    model, twin = mlp(recipe), mlp()
    for a, b in zip(
        torch.autograd.grad(loss_of(model), list(model.parameters())),
        torch.autograd.grad(loss_of(twin), list(twin.parameters())),
        strict=True,
    ):
        assert distance(a, b) < 0.2
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_penalties_on_gradients_are_right_or_refused(recipe):
    """create_graph: a second derivative is never silently zero."""

    def penalty(model):
        x = batch()[0].requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (g.square().sum() + loss_of(model)).backward()

    model, twin = mlp(recipe), mlp()
    penalty(twin)
    try:
        penalty(model)
    except RuntimeError as error:
        assert "FP8 layers have first derivatives" in str(error)
        return
    same_gradients(model, twin, 0.3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_mode_and_functional_transforms(recipe):
    """jvp, hvp, vmap and per-sample gradients: right, or refused."""
    model, twin = mlp(recipe), mlp()
    x = batch(4)[0]
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(8))

    def f(m):
        return lambda t: m(t).square().sum()

    def vmapped(m):
        return torch.func.vmap(lambda row: m(row[None])[0])(x)

    def sample_gradients(m):
        parameters = {n: p.detach() for n, p in m.named_parameters()}

        def one(p, row):
            return torch.func.functional_call(m, p, (row[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(one), (None, 0))(parameters, x)["0.weight"]

    cases = {
        "jvp": lambda m: torch.func.jvp(f(m), (x,), (v,))[1],
        "autograd.jvp": lambda m: torch.autograd.functional.jvp(f(m), x, v)[1],
        "hvp": lambda m: torch.autograd.functional.hvp(f(m), x, v)[1],
        "jacrev": lambda m: torch.func.jacrev(f(m))(x),
        "hessian": lambda m: torch.func.hessian(lambda t: f(m)(t[None]))(x[0]),
        "vmap": vmapped,
        "per-sample gradients": sample_gradients,
    }
    for name, case in cases.items():
        wanted = case(twin)
        try:
            got = case(model)
        except (RuntimeError, NotImplementedError):
            continue
        assert distance(got, wanted) < 0.3, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_hooks_on_weights(recipe):
    """Tensor hooks change gradients; post-accumulate hooks see them; both fire once a backward."""
    model, twin = mlp(recipe), mlp()
    seen = []
    for m in (model, twin):
        m[0].weight.register_hook(lambda g: g * 2)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    loss_of(model).backward()
    loss_of(twin).backward()
    same_gradients(model, twin)
    assert len(seen) == 1 and seen[0] is model[0].weight.grad

    outputs = []
    model[0].register_forward_hook(lambda module, args, y: outputs.append(y) or y * 0)
    model[0].register_full_backward_hook(lambda module, gi, go: outputs.append(go[0]))
    model.zero_grad()
    loss_of(model).backward()
    assert len(outputs) == 2 and not plain(model[0].weight.grad).any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_freezing_and_thawing(recipe):
    model, twin = mlp(recipe), mlp()
    for wanted in (False, True):
        for m in (model, twin):
            m[0].requires_grad_(wanted)
            m.zero_grad()
            loss_of(m).backward()
        assert (model[0].weight.grad is not None) == wanted
        assert distance(model[2].weight.grad, twin[2].weight.grad) < 0.2
    same_gradients(model, twin)


@pytest.mark.parametrize("recipe", RECIPES)
def test_pruning(recipe):
    model = mlp(recipe)
    loss_of(model).backward()
    keep = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) > 0
    wanted = values(model)
    prune.custom_from_mask(model[0], "weight", keep)
    wanted["0.weight"] = wanted["0.weight"] * keep
    assert_computes_with(model, wanted)
    model.zero_grad()
    loss_of(model).backward()
    assert not plain(model[0].weight_orig.grad)[~keep].any()
    prune.remove(model[0], "weight")
    assert not plain(model[0].weight)[~keep].any()
    assert_computes_with(model, wanted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    assert_computes_with(model, values(model))


class _Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).transpose(-1, -2)


@pytest.mark.parametrize("how", ["parametrize", "weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_parametrized_weights(recipe, how):
    """Before convert they are left, or work; after it they work."""
    add = {
        "parametrize": lambda m: parametrize.register_parametrization(m, "weight", _Symmetric()),
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
    }[how]
    first, after = mlp(), mlp(recipe)
    twins = mlp(), twin_of(after)
    loss_of(after).backward()
    for m in (*twins, first, after):
        torch.manual_seed(1)
        add(m[0])
    qv.convert(first, recipe)
    for model, twin in zip((first, after), twins, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.no_grad():
            assert distance(model(batch()[0]), twin(batch()[0])) < 0.1
        before = loss_of(model).item()
        for _ in range(10):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        assert loss_of(model).item() < before
        parametrize.remove_parametrizations(model[0], "weight")
        assert_computes_with(model, values(model))


@pytest.mark.parametrize("recipe", RECIPES)
def test_tying_after_convert(recipe):
    model, twin = mlp(recipe), mlp()
    for m in (model, twin):
        loss_of(m).backward()
        m.zero_grad()
        m[2].weight = m[0].weight
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        for _ in range(3):
            loss_of(m).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(list(model.parameters())) == 2
    assert_computes_with(model, values(model) | {"2.weight": values(model)["0.weight"]})
    assert distance(model[0].weight.detach(), twin[0].weight) < 0.05


@pytest.mark.parametrize("to", ["half", "bfloat16", "double", "float", "to twice", "type"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_other_dtypes(recipe, to):
    """A cast of the model keeps its values and trains on, or is refused."""
    cast = {
        "half": lambda m: m.half(),
        "bfloat16": lambda m: m.bfloat16(),
        "double": lambda m: m.double(),
        "float": lambda m: m.float(),
        "to twice": lambda m: m.to(torch.bfloat16).to(torch.float32),
        "type": lambda m: m.type(torch.bfloat16),
    }[to]
    model = mlp(recipe)
    loss_of(model).backward()
    model.zero_grad()
    start = values(model)
    try:
        cast(model)
        dtype = next(model.parameters()).dtype
        loss = nn.functional.mse_loss(model(batch()[0].to(dtype)).float(), batch()[1])
    except (TypeError, ValueError) as error:
        assert to == "double" and "must be float32, float16 or bfloat16" in str(error)
        return
    assert all(distance(p, start[n]) < 2**-8 for n, p in values(model).items())
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        twin = mlp(dtype=dtype)
        twin.load_state_dict(values(model))
        assert distance(model(batch()[0].to(dtype)), twin(batch()[0].to(dtype))) < 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_meta_device(recipe):
    """Made on meta, filled by to_empty and a state dict, or by assignment."""
    source = mlp(recipe)
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH, bias=False)
        )
    qv.convert(model, recipe)
    assert model(torch.empty(4, WIDTH, device="meta")).is_meta
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        model(torch.randn(4, WIDTH))
    assigned = copy.deepcopy(model)
    assigned.load_state_dict(source.state_dict(), assign=True)
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    for m in (model, assigned):
        assert all(torch.equal(p, values(source)[n]) for n, p in values(m).items())
        assert_computes_with(m, values(source))
        loss_of(m).backward()
        torch.optim.SGD(m.parameters(), lr=0.1).step()
        assert_computes_with(m, values(m))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_default_dtype(recipe, dtype):
    """A model in f32 converts, trains and resumes under another default dtype as without."""
    losses = []
    for chosen in (torch.float32, dtype):
        model, tokens = llama(), torch.arange(48).reshape(2, 24)
        torch.set_default_dtype(chosen)
        try:
            qv.convert(model, recipe)
            optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe=recipe)
            found = []
            for _ in range(6):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(tokens, labels=tokens).loss
                loss.backward()
                qv.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
                state = optimizer.state_dict()
                optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe=recipe)
                optimizer.load_state_dict(state)
        finally:
            torch.set_default_dtype(torch.float32)
        losses.append(found)
    assert losses[0][-1] < losses[0][0] - 0.3
    # Attention's mask and rotation are in the default dtype: transformers' own, not bit for bit.
    assert losses[1] == pytest.approx(losses[0], abs=0.1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpointed_layers(recipe):
    for reentrant in (False, True):
        grads = []
        for on in (False, True):
            model = mlp(recipe)
            x, y = batch()
            x.requires_grad_()
            for _ in range(3):
                h = (
                    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
                    if on
                    else model(x)
                )
                nn.functional.mse_loss(h, y).backward()
            grads.append([plain(p.grad) for p in model.parameters()] + [x.grad])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_convert_train_and_serve_beside_each_other(recipe):
    """Each finds what it finds alone."""
    text = torch.arange(48).reshape(2, 24)
    twin, served = llama(seed=4).eval(), llama(recipe, seed=5).eval()
    with torch.no_grad():
        wanted = twin(text).logits, served(text).logits
    alone = _converted_losses(recipe, text)
    failures, stop = [], threading.Event()

    def serve():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    found = twin(text).logits, served(text).logits
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        except BaseException as error:
            failures.append(error)

    def work():
        try:
            for _ in range(4):
                assert _converted_losses(recipe, text) == alone
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    servers = [threading.Thread(target=serve) for _ in range(2)]
    for thread in workers + servers:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in servers:
        thread.join()
    assert not failures, failures[0]


_making = threading.Lock()  # of torch's one generator


def _converted_losses(recipe, tokens):
    with _making:
        model = llama(seed=6)
    qv.convert(model, recipe)
    # Its rounding has seeds of its own; torch's optimizers would draw them from the one generator.
    optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe=recipe)
    losses = []
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
