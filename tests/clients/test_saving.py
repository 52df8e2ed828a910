"""How others store and send a model, its gradients and its optimizer: round trips or refusals."""

import copy
import io
import multiprocessing
import pickle

import numpy as np
import pytest
import ranks  # noqa: F401
import safetensors.torch
import torch
from small import RECIPES, assert_computes_with, batch, distance, mlp, plain, values
from torch import nn

import quaver as qv


def trained(recipe, make=qv.AdamW, steps=3, seed=0):
    model = mlp(recipe, seed)
    optimizer = make(model.parameters(), lr=1e-2)
    step(model, optimizer, steps)
    return model, optimizer


def step(model, optimizer, count=1):
    x, y = batch()
    losses = []
    for _ in range(count):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def through_torch(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


WAYS = {
    "torch.save": lambda v: through_torch(v, weights_only=True),
    "map_location a string": lambda v: through_torch(v, map_location="cpu", weights_only=True),
    "map_location a device": lambda v: through_torch(v, map_location=torch.device("cpu")),
    "map_location a dict": lambda v: through_torch(v, map_location={"cuda:0": "cpu"}),
    "map_location a function": lambda v: through_torch(v, map_location=lambda s, where: s),
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "deepcopy": copy.deepcopy,
    "to another device and back": lambda v: torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.to("cpu", copy=True), v
    ),
    "clone": lambda v: torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, v),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_state_dicts_come_back(recipe, way):
    """Of the model and the optimizer: the losses go on as without, bit for bit."""
    model, optimizer = trained(recipe)
    state = WAYS[way]((dict(model.state_dict()), optimizer.state_dict()))
    again, resumed = trained(recipe, seed=1, steps=1)
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    assert step(again, resumed, 3) == step(model, optimizer, 3)
    assert all(torch.equal(p, values(model)[n]) for n, p in values(again).items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_come_back(recipe, way):
    model = mlp(recipe)
    x, y = batch()
    nn.functional.mse_loss(model(x), y).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    back = WAYS[way](grads)
    for name, grad in grads.items():
        assert torch.equal(plain(back[name]), plain(grad))
        back[name].zero_()
        assert plain(grad).abs().sum() > 0, "the copy is the original"


@pytest.mark.parametrize("recipe", RECIPES)
def test_dlpack_reads_values(recipe):
    model, _ = trained(recipe)
    for name, p in model.named_parameters():
        assert torch.equal(plain(torch.from_dlpack(p.detach(), copy=True)), values(model)[name])
        if isinstance(p, qv.ScaledTensor):
            with pytest.raises(BufferError, match="__dlpack__: a ScaledTensor"):
                torch.from_dlpack(p.detach())


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_of_a_state_dict_are_plain(recipe):
    """What any library does with them: addresses, storages, NumPy, arithmetic, files."""
    model, _ = trained(recipe)
    state = model.state_dict()
    addresses = [value.data_ptr() for value in state.values() if value.numel()]
    assert all(addresses) and len(set(addresses)) == len(addresses)
    for name, value in values(model).items():
        assert torch.equal(state[name].float(), value)
        assert np.array_equal(np.asarray(state[name].float()), value.numpy())
        assert state[name].untyped_storage().nbytes() >= value.numel()
    half = {name: value.half() for name, value in state.items()}
    assert all(type(value) is torch.Tensor for value in half.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_safetensors(recipe, tmp_path):
    """Files that the world reads: of the state dict, and of the model by save_model."""
    model, _ = trained(recipe)
    for save in (
        lambda path: safetensors.torch.save_file(model.state_dict(), path),
        lambda path: safetensors.torch.save_model(model, str(path)),
    ):
        path = tmp_path / "model.safetensors"
        save(path)
        twin = mlp(seed=1)
        found = twin.load_state_dict(safetensors.torch.load_file(path), strict=False)
        assert not found.missing_keys
        assert all(torch.equal(p, values(model)[n]) for n, p in values(twin).items())
        again = mlp(recipe, seed=1)
        safetensors.torch.load_model(again, str(path))
        assert all(torch.equal(p, values(model)[n]) for n, p in values(again).items())
        with torch.no_grad():
            x = batch()[0]
            assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("way", ["torch.save", "pickle", "deepcopy"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_models_and_optimizers(recipe, way):
    """The pair goes on as the original, and is no part of it."""
    model, optimizer = trained(recipe)
    x, y = batch()
    nn.functional.mse_loss(model(x), y).backward()
    pair = {
        "torch.save": lambda v: through_torch(v, weights_only=False),
        "pickle": lambda v: pickle.loads(pickle.dumps(v)),
        "deepcopy": copy.deepcopy,
    }[way]((model, optimizer))
    again, resumed = pair
    optimizer.zero_grad()
    resumed.zero_grad()
    kept = values(again)
    expected = step(model, optimizer, 3)
    assert all(torch.equal(p, kept[n]) for n, p in values(again).items())
    assert_computes_with(again, kept)
    assert step(again, resumed, 3) == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_moving_average_by_deepcopy(recipe):
    """The way most people write one: a deep copy, and lerp_ or assignment of its parameters."""
    model, optimizer = trained(recipe)
    average = copy.deepcopy(model).requires_grad_(False)
    wanted = values(average)
    for _ in range(5):
        step(model, optimizer, 2)
        for (name, a), p in zip(average.named_parameters(), model.parameters(), strict=True):
            a.lerp_(p.detach(), 0.5)
            wanted[name].lerp_(plain(p), 0.5)
    for name, value in values(average).items():
        assert distance(value, wanted[name]) < 0.01, name
    assert_computes_with(average, wanted)

    new = {name: 0.5 * value for name, value in wanted.items()}
    for name, a in average.named_parameters():
        a.data = new[name].to(a.dtype)
    assert_computes_with(average, new)


@pytest.mark.parametrize("recipe", RECIPES)
def test_averages_of_state_dicts(recipe):
    """A model soup; its values go back by load_state_dict."""
    models = [trained(recipe, seed=seed)[0] for seed in (0, 1)]
    states = [m.state_dict() for m in models]
    wanted = {n: (p + values(models[1])[n]) / 2 for n, p in values(models[0]).items()}
    soup = {name: (states[0][name] + states[1][name]) / 2 for name in wanted}
    models[0].load_state_dict(soup, strict=False)
    assert all(distance(p, wanted[n]) < 2**-8 for n, p in values(models[0]).items())
    assert_computes_with(models[0], wanted)


def _add_one(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)


def _sum(model, queue):
    queue.put([plain(p).sum().item() for p in model.parameters()])


@pytest.mark.parametrize("recipe", RECIPES)
def test_shared_memory_between_processes(recipe):
    """Hogwild: a child's writes are seen by the parent; or sharing is refused by name."""
    model, _ = trained(recipe)
    start = values(model)
    try:
        model.share_memory()
    except (RuntimeError, TypeError) as error:
        assert "ScaledTensor" in str(error)
        assert recipe == "fp8lm-o2"
        return
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_add_one, args=(model,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    for name, p in values(model).items():
        assert distance(p, start[name] + 1) < 2**-7, name
    assert_computes_with(model, values(model))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_models_are_sent_to_processes(recipe, method):
    model, _ = trained(recipe)
    context = torch.multiprocessing.get_context(method)  # ranks.py has loaded torch in the server
    queue = context.SimpleQueue()
    process = context.Process(target=_sum, args=(model, queue))
    try:
        process.start()
    except (RuntimeError, TypeError) as error:
        assert "ScaledTensor" in str(error)
        return
    process.join(120)
    assert process.exitcode == 0
    assert queue.get() == [p.sum().item() for p in values(model).values()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_distributed_checkpoint_of_one_process(recipe, tmp_path):
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = trained(recipe)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    again, resumed = trained(recipe, seed=1)
    model_state, optimizer_state = get_state_dict(again, resumed)
    state = {"model": model_state, "optimizer": optimizer_state}
    load(state, checkpoint_id=tmp_path)
    set_state_dict(
        again, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    assert step(again, resumed, 3) == step(model, optimizer, 3)
