"""A training step leaves the host free: it reads no value of the device, and copies between the two
are asynchronous. On meta tensors, whose values nobody can read, and on the CPU for the optimizers
whose host chooses a subspace now and then.
"""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import quaver as qv
from quaver import recipe

aten = torch.ops.aten
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Copies(TorchFunctionMode):
    """Refuses tensors made of a list on another device, which no dispatch mode sees."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            assert made.device.type == "cpu", f"{func.__name__} copies from pageable memory"
        return made


class NoSync(TorchDispatchMode):
    """Refuses what would wait for `device`."""

    def __init__(self, device):
        super().__init__()
        self.device, self.copies = device, _Copies()

    def __enter__(self):
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.copies.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        reads = READS & set(func.tags) and any(t.device.type == self.device for t in inputs)
        assert not reads, f"{func} reads a value"
        if func in (aten._to_copy.default, aten.copy_.default):
            devices = {t.device.type for t in inputs} | {
                torch.device(kwargs.get("device", inputs[0].device)).type
            }
            free = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
            assert free or len(devices) == 1, f"{func} waits for {' and '.join(sorted(devices))}"
        return func(*args, **kwargs)


def model_of(device):
    torch.manual_seed(0)
    with torch.device(device):
        return nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 128))


def steps_of(model, optimizer, device):
    x = torch.randn(32, 128, device=device)

    def step():
        model(x).sum().backward()
        qv.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the states
    with NoSync(device):
        step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.5  # as a schedule does
        step()


@pytest.mark.parametrize("name", recipe.names())
def test_a_step_of_a_recipe(name):
    model = qv.convert(model_of("meta"), name)
    steps_of(model, qv.AdamW(model.parameters(), 1e-3, recipe=name), "meta")


OPTIMIZERS = {
    **{
        name: lambda model, name=name: qv.AdamW(model.parameters(), 1e-3, recipe=name)
        for name in recipe.step_names()
    },
    "microadam": lambda model: qv.MicroAdam(model.parameters(), 1e-3),
    "grass": lambda model: qv.Grass(model, 1e-3, rank=16),
}
CHOOSE = {"snsm", "grass"}  # whose first step reads on the host what to choose


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_an_optimizer(name):
    device = "cpu" if name in CHOOSE else "meta"
    model = model_of(device)
    steps_of(model, OPTIMIZERS[name](model), device)


@pytest.mark.parametrize("name", ["bf16", "coat", "adamw-4bit"])
@pytest.mark.parametrize("clip", ["tensor", "lagged"])
def test_a_step_inside_backward(name, clip):
    model = model_of("meta")
    if name in recipe.names():
        qv.convert(model, name)
    optimizer = qv.AdamW(model.parameters(), 1e-3, recipe=name)
    qv.release_gradients(model, optimizer, max_norm=1.0, clip=clip)
    x = torch.randn(32, 128, device="meta")

    def step():
        model(x).sum().backward()
        optimizer.step()

    step()
    with NoSync("meta"):
        step()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.to("cpu"),
        lambda x: x.copy_(torch.zeros(4)),
        lambda x: torch.tensor([1.0], device="meta"),
        lambda x: x.nonzero(),
    ],
)
def test_the_mode_finds_what_waits(wait):
    x = torch.zeros(4, device="meta")
    with NoSync("meta"), pytest.raises(AssertionError):
        wait(x)
    with NoSync("cpu"), pytest.raises(AssertionError, match="reads a value"):
        torch.zeros(()).item()
