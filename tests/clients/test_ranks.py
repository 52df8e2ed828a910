"""Hand-written and torch's own data parallelism over a converted model, on two ranks of gloo."""

import pytest
import torch
import torch.distributed as dist
from rank_pool import run
from small import RECIPES, batch, distance, mlp, plain, values
from torch import nn

import quaver as qv

pytestmark = pytest.mark.slow


def _loss(model, rank):
    x, y = batch(seed=rank)
    return nn.functional.mse_loss(model(x), y)


def _refused(error):
    text = str(error)
    return ("refused", text) if "ScaledTensor" in text or "read-only" in text else ("error", text)


def _train(rank, model, optimizer, average=None, steps=4):
    for _ in range(steps):
        _loss(model, rank).backward()
        if average is not None:
            average(model)
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def both_batches(recipe, steps=4):
    """One process, both ranks' batches: what data parallelism must find."""
    model = mlp(recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(steps):
        for rank in range(2):
            (_loss(model, rank) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def by_all_reduce(model):
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def by_average(model):
    """all_reduce of .data, then a division in place."""
    for p in model.parameters():
        dist.all_reduce(p.grad.data)
        p.grad.div_(2)


def by_coalescing(model):
    grads = [p.grad for p in model.parameters()]
    flat = torch._utils._flatten_dense_tensors(grads)
    dist.all_reduce(flat)
    parts = torch._utils._unflatten_dense_tensors(flat / 2, grads)
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part)


def by_gather(model):
    for p in model.parameters():
        parts = [torch.empty_like(p.grad) for _ in range(2)]
        dist.all_gather(parts, p.grad)
        p.grad.copy_((parts[0] + parts[1]) / 2)


def by_reduce_and_broadcast(model):
    for p in model.parameters():
        dist.reduce(p.grad, 0)
        dist.broadcast(p.grad, 0)
        p.grad.mul_(0.5)


AVERAGES = {f.__name__: f for f in (by_all_reduce, by_average, by_coalescing, by_gather,
                                    by_reduce_and_broadcast)}  # fmt: skip


def _averages(rank, recipe, name):
    model = mlp(recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    try:
        return "done", _train(rank, model, optimizer, AVERAGES[name])
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return _refused(error)


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_averaged_by_hand(recipe, name):
    """Every rank the same, and what one process finds with both batches; or refused on both."""
    (kind, one), (other_kind, two) = run(2, _averages, recipe, name)
    assert kind == other_kind
    if kind != "done":
        assert kind == "refused" and recipe == "fp8lm-o2", one
        return
    wanted, start = both_batches(recipe), values(mlp(recipe))
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
        moved = wanted[key] - start[key]
        assert distance(value - start[key], moved) < 0.15, key


def _broadcasts(rank, recipe, what):
    model = mlp(recipe, seed=rank)
    _loss(model, 0).backward()
    before = values(model)
    tensors = {
        "parameters": lambda: list(model.parameters()),
        "data": lambda: [p.data for p in model.parameters()],
        "detached": lambda: [p.detach() for p in model.parameters()],
        "state dict": lambda: list(model.state_dict().values()),
        "gradients": lambda: [p.grad for p in model.parameters()],
    }[what]
    try:
        with torch.no_grad():
            for tensor in tensors():
                dist.broadcast(tensor, 0)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        dist.barrier()
        same = all(torch.equal(p, before[n]) for n, p in values(model).items())
        return *_refused(error), same
    x = batch()[0]
    with torch.no_grad():
        grads = [plain(p.grad) for p in model.parameters()]
        return "done", values(model), (model.eval()(x), grads)


@pytest.mark.parametrize("what", ["parameters", "data", "detached", "state dict", "gradients"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_broadcasts(recipe, what):
    one, two = run(2, _broadcasts, recipe, what)
    assert one[0] == two[0]
    if one[0] != "done":
        assert one[0] == "refused" and recipe == "fp8lm-o2" and one[2] and two[2], one[1]
        return
    if what == "gradients":
        assert all(torch.equal(a, b) for a, b in zip(one[2][1], two[2][1], strict=True))
        return
    assert all(torch.equal(value, two[1][key]) for key, value in one[1].items())
    assert torch.equal(one[2][0], two[2][0])
    assert all(torch.equal(p, one[1][n]) for n, p in values(mlp(recipe)).items())


def _sends(rank, recipe):
    model = mlp(recipe, seed=rank)
    for p in model.parameters():
        if rank == 0:
            dist.send(p.data, 1)
            continue
        try:
            dist.recv(p.data, 0)
        except RuntimeError as error:  # then as it says: into a plain tensor, and copy_
            assert recipe == "fp8lm-o2" and "ScaledTensor" in str(error) and "copy_" in str(error)
            received = torch.empty(p.shape, dtype=p.dtype)
            dist.recv(received, 0)
            p.data.copy_(received)
    return values(model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_send_and_receive(recipe):
    one, two = run(2, _sends, recipe)
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def _objects(rank, recipe):
    model = mlp(recipe, seed=rank)
    optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe=recipe)
    _train(rank, model, optimizer, steps=2)
    found = [None, None]
    dist.all_gather_object(found, (model.state_dict(), optimizer.state_dict()))
    model.load_state_dict(found[0][0])
    optimizer.load_state_dict(found[0][1])
    return _train(0, model, optimizer, steps=2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_objects_are_gathered(recipe):
    """State dicts by pickle: both ranks go on as the first."""
    one, two = run(2, _objects, recipe)
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def _stock_ddp(rank, recipe, options):
    model = mlp(recipe, seed=rank)  # the wrapper's broadcast makes them equal
    try:
        parallel = nn.parallel.DistributedDataParallel(model, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        return _refused(error)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(4):
        try:
            _loss(parallel, rank).backward()
        except (RuntimeError, TypeError, ValueError) as error:
            return _refused(error)
        optimizer.step()
        optimizer.zero_grad()
    return "done", values(model)


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}],
                         ids=["plain", "bucket views", "static"])  # fmt: skip
@pytest.mark.parametrize("recipe", RECIPES)
def test_torchs_ddp(recipe, options):
    (kind, one), (other_kind, two) = run(2, _stock_ddp, recipe, options)
    assert kind == other_kind
    if kind != "done":
        assert kind == "refused" and recipe == "fp8lm-o2", one
        return
    wanted, start = both_batches(recipe), values(mlp(recipe))
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
        assert distance(value - start[key], wanted[key] - start[key]) < 0.15, key


def uniform(recipe):
    """torch wants parameters of one dtype here: coat's is bf16, so the whole model is."""
    return mlp(recipe, dtype=torch.bfloat16 if recipe == "coat" else torch.float32)


def _zero_redundancy(rank, recipe):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = uniform(recipe)
    try:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        found = _train(0, model, optimizer)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return _refused(error)
    with torch.no_grad():
        return "done", found, model.eval()(batch()[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_torchs_zero_redundancy_optimizer(recipe):
    one, two = run(2, _zero_redundancy, recipe)
    assert one[0] == two[0]
    if one[0] != "done":
        assert one[0] == "refused" and recipe == "fp8lm-o2", one[1]
        return
    model = uniform(recipe)
    wanted = _train(0, model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for key, value in one[1].items():
        assert torch.equal(value, two[1][key]), key
        assert distance(value, wanted[key]) < 2**-9, key
    assert torch.equal(one[2], two[2])
