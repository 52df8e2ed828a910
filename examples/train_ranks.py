"""A plain PyTorch loop on several ranks: FP8 gradients and weights between them.

torchrun --nproc-per-node 2 examples/train_ranks.py [steps] [checkpoint]
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import quaver as qv

RECIPE = "fp8lm-o3"
ROWS = 512  # of all ranks together


def main(steps: int = 200, path: str = "example.safetensors") -> None:
    qv.distributed.init("cpu")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same teacher and data everywhere; each rank takes its rows
    teacher = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 16))
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(),
                          nn.Linear(256, 16))  # fmt: skip
    qv.convert(model, recipe=RECIPE)
    optimizer = qv.distributed.ZeroAdamW(
        model.parameters(), lr=3e-3, weight_decay=0.01, recipe=RECIPE
    )
    parallel = qv.distributed.ddp(model, optimizer=optimizer)
    for step in range(steps):
        x = torch.randn(ROWS, 64).tensor_split(size)[rank]
        with torch.no_grad():
            y = teacher(x)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(model(x).float(), y)
        loss.backward()  # leaves each mean gradient on the rank that owns its weight
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()  # and brings every rank the new weights
        optimizer.zero_grad()
        if rank == 0 and (step % 50 == 0 or step == steps - 1):
            print(f"step {step:4d}  loss of rank 0 {loss.item():.4f}")
    if rank == 0:
        sent = ", ".join(f"{n:,} {kind}" for kind, n in parallel.transport.traffic.items())
        print(f"bytes sent by a rank: {sent}")
    qv.distributed.save(path, model, optimizer, parallel=parallel, step=steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
