"""torch's own wrappers around converted models: they train as one process does, or are refused by
name."""

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import quaver as qv

SIZE, STEPS, ROWS = 2, 4, 8
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.norm = nn.RMSNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, x):
        return self.down(F.relu(self.up(self.norm(self.embedding(x)))))


WRAPPERS = {
    "one process": lambda model: model,
    "DDP": DistributedDataParallel,
    "DDP, views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=CPU),
    "FSDP1, original": lambda model: FullyShardedDataParallel(
        model, device_id=CPU, use_orig_params=True
    ),
    "ZeroRedundancyOptimizer": DistributedDataParallel,
}
FSDP_REFUSES = "FullyShardedDataParallel: a Linear of a recipe with f16 masters cannot be flattened"
TWO_DTYPES = "Must flatten tensors with uniform dtype"
REFUSED = {
    ("fp8lm-o2", "FSDP1"): FSDP_REFUSES,
    ("fp8lm-o2", "FSDP1, original"): FSDP_REFUSES,
    ("fp8lm-o2", "ZeroRedundancyOptimizer"): "a collective cannot write to a ScaledTensor",
    ("coat", "FSDP1"): TWO_DTYPES,
    ("coat", "FSDP1, original"): TWO_DTYPES,
    ("coat", "ZeroRedundancyOptimizer"): "only supports using the same dense type",
}


def batch(step):
    return torch.randint(16, (SIZE * ROWS, 8), generator=torch.Generator().manual_seed(step))


def train(rank, size, recipe, kind):
    """Losses of this rank's part of the batches, and the weights after them."""
    torch.manual_seed(0)
    model = qv.convert(Net(), recipe)
    wrapped = WRAPPERS[kind](model)
    if kind == "ZeroRedundancyOptimizer":
        options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}  # of qv.AdamW too
        optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, **options)
    else:
        optimizer = qv.AdamW(wrapped.parameters(), lr=1e-2, recipe=recipe)
    losses = []
    for step in range(STEPS):
        x = batch(step).chunk(size)[rank]
        loss = F.cross_entropy(wrapped(x).flatten(0, 1), x.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if kind.startswith("FSDP1"):
        with FullyShardedDataParallel.summon_full_params(wrapped):
            return losses, [p.detach().clone() for p in model.parameters()]
    weights = [p.dequantize() if isinstance(p, qv.ScaledTensor) else p for p in model.parameters()]
    return losses, [w.detach().clone() for w in weights]


def on_a_rank(rank, recipe, kind):
    try:
        return train(rank, dist.get_world_size(), recipe, kind)
    except (ValueError, RuntimeError) as error:
        return str(error)


RECIPES = ("f32", "tensorwise", "blockwise", "fp8lm-o2", "coat")
CASES = [(r, kind) for r in RECIPES for kind in list(WRAPPERS)[1:]]


@pytest.mark.parametrize(("recipe", "kind"), CASES)
def test_torchs_wrappers_train_or_are_refused(recipe, kind):
    found = ranks.run(SIZE, on_a_rank, recipe, kind)
    if (recipe, kind) in REFUSED:
        for text in found:
            assert REFUSED[recipe, kind] in text
        return
    alone, _ = train(0, 1, recipe, "one process")
    mean = [sum(losses) / SIZE for losses in zip(*(losses for losses, _ in found), strict=True)]
    # Of FP8, activations and gradients are scaled by each rank's own amax.
    assert mean == pytest.approx(alone, rel=1e-5 if recipe == "f32" else 0.02)
    assert mean[-1] < 0.9 * mean[0]
    if not kind.startswith("FSDP1"):
        for mine, other in zip(found[0][1], found[1][1], strict=True):
            assert torch.equal(mine, other)
